"""The teacher of a distillation: an adapter on the student's own base where it can be, else a model beside it."""

from __future__ import annotations

from typing import Any

from pipeline import handoff
from pipeline.config.distill import Distill, Teacher
from pipeline.config.methods import METHODS
from pipeline.config.recipe import BASE
from pipeline.errors import UserError
from pipeline.model.assemble import Part, add_adapter, plain, speaking
from pipeline.model.load import causal, tokenizer, whole_weights
from pipeline.model.roles import Role, Roles
from pipeline.stage import Context
from stages.distill.pair import STUDENT, TEACHER


def taught(context: Context, block: Distill, student: Any, base: dict[str, Any], tok: Any, device: Any) -> Roles:
    """`student`, which `base` records the weights below of, and its teacher as roles.

    A teacher whose base holds the student's weights, with an adapter that PEFT can put beside the student's or with none, is
    put on it: one copy of the weights. Every other teacher is loaded whole on every rank, under ZeRO-3 too.
    """
    part = _part(context, block)
    check_vocabulary(context, block.teacher, tok)
    name = "default" if hasattr(student, "peft_config") else None
    trunks, shared = {STUDENT: student}, _shares(block, part, base)
    if shared:
        trunks[STUDENT] = _adapted(student, part)
    if not shared:
        with whole_weights():
            other = _adapted(causal(part.base, tok, sharded=False), part)
        trunks[TEACHER] = other.eval().to(device)
    teacher = Role(STUDENT if shared else TEACHER, TEACHER if part.adapter is not None else None, trained=False)
    roles = Roles(trunks, {}, {STUDENT: Role(STUDENT, name, trained=True), TEACHER: teacher})
    roles.use(STUDENT)
    if context.is_main:
        where = "on the student's copy of the base's weights" if shared else "a model of its own, whole on every rank"
        print(f"teacher: {where}", flush=True)
    return roles


def _part(context: Context, block: Distill) -> Part:
    given = block.teacher
    if given.stage is not None:
        return speaking(context, None if given.stage == BASE else context.batons[given.stage])
    assert given.model is not None
    own = given.model_dump(include={"revision", "quantization", "trust_remote_code"})
    own["model"] = context.recipe.local(given.model)
    return Part(block.base.model_copy(update=own | {"dtype": given.dtype or block.base.dtype}))


def _adapted(trunk: Any, part: Part) -> Any:
    """`trunk` with the teacher's adapter, if it has one."""
    if part.adapter is None:
        return trunk
    config, weights = part.adapter
    assert config is not None
    return add_adapter(trunk, TEACHER, config, weights)


def _shares(block: Distill, part: Part, base: dict[str, Any]) -> bool:
    """Whether the teacher can stand on the weights below the student's adapter, which `base` records."""
    method = METHODS[block.adapter.method]
    if block.adapter.is_full or not method.shared or part.base.dtype != block.base.dtype:
        return False
    config = part.adapter[0] if part.adapter is not None else None
    if config is not None and str(config.peft_type.value) != method.peft:
        return False
    same = handoff.model_hash(part.base.model, part.base.revision) == base["content_hash"]
    return same and part.base.quantization == base["quantization"]


def check_vocabulary(context: Context, given: Teacher, tok: Any) -> None:
    """Refuse a teacher whose token ids mean something else than the student's."""
    if given.stage is not None:
        told = context.base if given.stage == BASE else str(context.batons[given.stage].path)
        trust = context.block.base.trust_remote_code
    else:
        told, trust = context.recipe.local(str(given.model)), given.trust_remote_code
    if tokenizer(told, given.revision, trust=trust).get_vocab() != tok.get_vocab():
        raise UserError(
            context.recipe.where("stages", context.stage, "teacher"),
            f"the tokenizer of {given.stage or given.model} is not the student's",
            expected="one vocabulary: the student learns the probability of every token",
            fix="name a teacher of the student's family",
        )


def check_context(context: Context, roles: Roles, longest: int) -> None:
    """Refuse texts of `longest` tokens where that is more than one of the two can read."""
    for name, role in roles.roles.items():
        text = plain(roles.trunks[role.trunk]).config.get_text_config()
        limit, virtual = getattr(text, "max_position_embeddings", None), len(roles.virtual(name))
        if limit is not None and longest + virtual > limit:
            raise UserError(
                context.recipe.where("stages", context.stage),
                f"texts of up to {longest} tokens, and the {name}'s context holds {limit - virtual}",
                fix="lower max_length, sampling.max_prompt_length or sampling.max_response_length",
            )
