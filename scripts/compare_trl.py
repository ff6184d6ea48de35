"""Relay's PPO beside TRL 1.12's: same base, prompts, rule reward, settings and episodes; reward at equal KL, seed by seed.

RELAY_TEST_DATA=... python scripts/compare_trl.py             # installs TRL 1.12 into a directory of its own; runs it all

TRL 1.12 is the last release with PPO. It is imported only by compare_trl/trl_ppo.py, in a process of its own. Finished
runs and measurements are kept in --work and not repeated while the settings are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = HERE / "compare_trl"
TRL, TRL_FOLDER = "trl==1.12.0", "trl-1.12"
SIDES = ("relay", "trl")
MARGIN = -0.1
"""Where the lower end of the interval must stay above, in standard deviations of the base's reward."""
QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5 %, by degrees of freedom."""

SCALES = (0.5, 0.7, 0.85, 1.0)
"""Shares of a final adapter at which it is measured, 0 being the base."""
SAMPLES, SAMPLES_ALONG = 16, 4
"""Replies per held-out prompt: of final policies and of snapshots along the training."""

# TRL's defaults where they fit: minibatches, clip ranges, vf_coef, gamma, lambda, betas, and no warm-up, weight decay or
# gradient clipping. How the others were chosen is said in `explained`.
SETTINGS: dict[str, Any] = {
    "reward": "story_reward:cheerful",
    "steps": 80,
    "batch": 128,
    "minibatches": 1,
    "epochs": 2,
    "prompt_tokens": 16,
    "response_tokens": 48,
    "temperature": 1.0,
    "lr": 2e-3,
    "lr_schedule": "linear",
    "betas": [0.9, 0.999],
    "kl_coef": 0.4,
    "clip": 0.2,
    "value_clip": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "r": 8,
    "alpha": 16,
    "targets": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "snapshot_every": 16,
    "held_out_prompts": 128,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--work", type=Path, default=Path("runs/compare_trl"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/compare_trl.md"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="one side alone writes no page")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another value of a setting")
    arguments = parser.parse_args()
    began = time.monotonic()
    work = arguments.work.resolve()
    changed = {key: json.loads(value) for key, _, value in (item.partition("=") for item in arguments.set)}
    if unknown := changed.keys() - SETTINGS.keys():
        parser.error(f"no such setting: {', '.join(sorted(unknown))}")
    settings = prepare(work, SETTINGS | changed)
    if "trl" in arguments.sides:
        install(work / TRL_FOLDER)
    train = {"relay": train_relay, "trl": train_trl}
    runs = [(side, seed) for seed in arguments.seeds for side in arguments.sides]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        spent = pool.map(lambda run: once(work, settings, *run, train[run[0]]), runs)
        seconds = dict(zip(runs, spent, strict=True))
        measured = list(pool.map(lambda side: measure(work, settings, side, arguments.seeds), arguments.sides))
    if set(arguments.sides) != set(SIDES):
        return
    if measured[0]["base"] != measured[1]["base"]:
        raise SystemExit("the base does not measure the same for both sides")
    found = measured[0] | measured[1]
    text = page(settings, arguments.seeds, arguments.set, arguments.jobs, found, seconds, time.monotonic() - began)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


# ---- what both sides are given


def prepare(work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write prompts, settings and Relay's recipe into `work`; runs made under other settings are removed."""
    data = Path(os.environ["RELAY_TEST_DATA"]).resolve()
    settings = settings | {
        "base": str(data / "stories260K"),
        "train": str(work / "train.jsonl"),
        "held_out": str(work / "held_out.jsonl"),
        "snapshots": list(range(settings["snapshot_every"], settings["steps"] + 1, settings["snapshot_every"])),
    }
    if settings["steps"] % settings["snapshot_every"]:
        raise SystemExit("steps is not a multiple of snapshot_every")
    prompts = story_prompts(data / "tinystories" / "tinystories_1000.json", settings)
    parts = {"held_out": prompts[: settings["held_out_prompts"]], "train": prompts[settings["held_out_prompts"] :]}
    settings |= {"train_prompts": len(parts["train"]), "rule": (PARTS / "story_reward.py").read_text(encoding="utf-8")}
    record, text = work / "settings.json", json.dumps(settings, indent=1)
    if work.exists() and (not record.exists() or record.read_text(encoding="utf-8") != text):
        for stale in {*work.glob("relay-*"), *work.glob("trl-*"), *work.glob("*.json")} - {work / TRL_FOLDER}:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    work.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
        Path(settings[name]).write_text("".join(lines), encoding="utf-8")
    (work / "relay.yaml").write_text(yaml.safe_dump(recipe(settings), sort_keys=False), encoding="utf-8")
    record.write_text(text, encoding="utf-8")
    return settings


def story_prompts(stories: Path, settings: dict[str, Any]) -> list[str]:
    """Each story's first words, as many whole ones as fit; the different ones, in the order of their hashes."""
    from transformers import AutoTokenizer

    tokenizer, prompts = AutoTokenizer.from_pretrained(settings["base"]), set()
    for story in json.loads(stories.read_text(encoding="utf-8")):
        words, fitting = story.split(), ""
        for count in range(1, len(words) + 1):
            opening = " ".join(words[:count])
            if len(tokenizer(opening)["input_ids"]) > settings["prompt_tokens"]:
                break
            fitting = opening
        if len(tokenizer(fitting)["input_ids"]) >= settings["prompt_tokens"] // 2:
            prompts.add(fitting)
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())


def recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as a Relay recipe of one stage."""
    ppo = {
        "kind": "ppo",
        "policy": "base",
        "reward": [{"function": settings["reward"]}],
        "critic": {"init": "policy"},
        "prompts": [{"path": settings["train"]}],
        "steps": settings["steps"],
        "rollout_batch": settings["batch"],
        "minibatches": settings["minibatches"],
        "epochs": settings["epochs"],
        "lr": settings["lr"],
        "lr_schedule": settings["lr_schedule"],
        "warmup": 0,
        "betas": settings["betas"],
        "max_grad_norm": 0.0,
        "kl": {"coef": settings["kl_coef"], "estimator": "k1"},
        "clip": settings["clip"],
        "value_clip": settings["value_clip"],
        "gamma": settings["gamma"],
        "lam": settings["lam"],
        "sampling": {
            "temperature": settings["temperature"],
            "max_prompt_length": settings["prompt_tokens"],
            "max_response_length": settings["response_tokens"],
            "batch": settings["batch"],
        },
        "save_every": settings["snapshot_every"],
        "keep_checkpoints": len(settings["snapshots"]),
    }
    return {
        "name": "compare-trl",
        "base": {"model": settings["base"], "dtype": "fp32"},
        "adapter": {"method": "lora", "r": settings["r"], "alpha": settings["alpha"], "targets": settings["targets"]},
        "deepspeed": {"config": "zero0", "num_gpus": 1},
        "data": {"holdout": 0.0},  # the held-out prompts are in a file of their own
        "stages": {"ppo": ppo},
    }


# ---- the runs


def install(folder: Path) -> None:
    """TRL 1.12 alone, over the installed torch, transformers and peft, in a directory that nothing else imports from."""
    if not (folder / "trl-1.12.0.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TRL]
        subprocess.run(pip, check=True)


def once(work: Path, settings: dict[str, Any], side: str, seed: int, train: Any) -> float:
    """Wall seconds of a run, or those noted when it was made before; what an unfinished run left is removed."""
    folder = work / f"{side}-{seed}"
    note = folder / "seconds.json"
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        train(work, seed, folder)
        note.write_text(json.dumps(round(time.monotonic() - began, 1)), encoding="utf-8")
    seconds = float(json.loads(note.read_text(encoding="utf-8")))
    print(f"{side}, seed {seed}: {seconds:.0f} s", flush=True)
    return seconds


def train_relay(work: Path, seed: int, folder: Path) -> None:
    relay = str(Path(sys.executable).parent / "relay")
    command = [relay, "run", str(work / "relay.yaml"), "--run-dir", str(folder / "run"), "--set", f"seed={seed}"]
    call(command, folder / "log", [])


def train_trl(work: Path, seed: int, folder: Path) -> None:
    program = [sys.executable, str(PARTS / "trl_ppo.py"), str(work / "settings.json"), str(seed), str(folder)]
    call(program, folder / "log", [work / TRL_FOLDER])


def call(command: list[str], log: Path, first: list[Path]) -> None:
    """Run a program on one core, the rule importable, its output in `log`."""
    paths = [*map(str, first), str(PARTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(command, cwd=ROOT, env=os.environ | env, stdout=stream, stderr=stream).returncode
    if code:
        tail = log.read_text(encoding="utf-8").splitlines()[-30:]
        raise SystemExit("\n".join([*tail, f"{' '.join(command)}: exit code {code}, see {log}"]))


def measure(work: Path, settings: dict[str, Any], side: str, seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Reward and KL of the base and of a side's policies, by one program that does not know which side it measures."""
    plan: list[dict[str, Any]] = [{"name": "base", "folder": None, "scale": 1.0, "samples": SAMPLES}]
    for seed in seeds:
        run = work / f"{side}-{seed}"
        places = {step: run / f"step-{step}" for step in settings["snapshots"]}
        if side == "relay":
            places = {step: run / "run" / "ppo" / "checkpoints" / f"step-{step}" for step in places}
        for step, folder in places.items():
            plan.append({"name": f"{run.name}-{step}", "folder": str(folder), "scale": 1.0, "samples": SAMPLES_ALONG})
        final = str(places[settings["steps"]])
        for scale in SCALES:
            plan.append({"name": f"{run.name}-x{scale}", "folder": final, "scale": scale, "samples": SAMPLES})
        if side == "relay":
            plan[-1]["same"] = str(run / "run" / "ppo" / "output")  # what it published is its last checkpoint
    written, out = work / f"plan-{side}.json", work / f"measured-{side}.json"
    written.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    program = [sys.executable, str(PARTS / "measure.py"), str(work / "settings.json"), str(written), str(out)]
    call(program, work / f"measured-{side}.log", [])
    found: dict[str, dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


# ---- the page


def front(found: dict[str, dict[str, Any]], side: str, seed: int) -> list[tuple[float, float]]:
    """(KL, reward) of a final policy from the base to itself: its adapter at every scale."""
    names = ["base", *(f"{side}-{seed}-x{scale}" for scale in SCALES)]
    return [(found[name]["kl"], found[name]["reward"]) for name in names]


def reward_at(points: list[tuple[float, float]], kl: float) -> float:
    """The reward at `kl`, between two points on a line in the root of the KL, in which such fronts are nearly straight."""
    for (low, before), (high, after) in itertools.pairwise(points):
        if low <= kl <= high:
            share = (math.sqrt(kl) - math.sqrt(low)) / (math.sqrt(high) - math.sqrt(low))
            return before + (after - before) * share
    raise ValueError(f"the policy never reaches a KL of {kl}")


def welch(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Difference of the means, lower and upper end of its 95 % interval (Welch 1947; degrees of freedom rounded down)."""
    parts = [statistics.variance(side) / len(side) for side in (ours, theirs)]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (ours, theirs), strict=True))
    mean = statistics.mean(ours) - statistics.mean(theirs)
    half = QUANTILES[max(1, int(freedom))] * math.sqrt(sum(parts))
    return mean, mean - half, mean + half


def page(
    settings: dict[str, Any],
    seeds: list[int],
    overrides: list[str],
    jobs: int,
    found: dict[str, dict[str, Any]],
    seconds: dict[tuple[str, int], float],
    elapsed: float,
) -> str:
    fronts = {run: front(found, *run) for run in seconds}
    top = min(points[-1][0] for points in fronts.values())
    levels = {top: "the smallest final KL of all runs", top / 2: "half of it", top / 4: "a quarter of it"}
    sets = "".join(f" --set {item}" for item in overrides)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed"))
    lines = [
        "# Relay's PPO beside TRL 1.12's",
        "",
        f"`RELAY_TEST_DATA=... python scripts/compare_trl.py{sets}`, Python {platform.python_version()}, {libraries}; "
        f"{TRL} in a directory of its own. {platform.machine()}, {os.cpu_count()} cores, one process and one thread per "
        f"run, {jobs} runs at a time; this call took {elapsed / 60:.0f} min. Commit {commit()}.",
        "",
        "Base: `stories260K`. Reward: different cheerful words in the reply less different gloomy ones, -6 to 6 "
        f"([the rule](../../scripts/compare_trl/story_reward.py)). The base's replies score {found['base']['reward']:.3f}, "
        f"standard deviation **{found['base']['reward_sd']:.3f}**, the unit of the differences below.",
        "",
        *verdict(seeds, fronts, levels, found["base"]["reward_sd"]),
        *every_seed(seeds, fronts, levels, found),
        *along(settings, seeds, found),
        "Wall seconds of each run, start to end, with imports, logs and snapshots:",
        "",
        "| seed | Relay | TRL |",
        "|---|---|---|",
        *(f"| {seed} | {seconds['relay', seed]:.0f} | {seconds['trl', seed]:.0f} |" for seed in seeds),
        "",
        *explained(settings),
        "",
        *differing(),
    ]
    return "\n".join(lines) + "\n"


Fronts = dict[tuple[str, int], list[tuple[float, float]]]


def verdict(seeds: list[int], fronts: Fronts, levels: dict[float, str], unit: float) -> list[str]:
    """The question, answered: the interval of the difference at each level of KL."""
    lines = [
        f"Final policies at equal KL, reward of Relay less that of TRL, in standard deviations; means over {len(seeds)} seeds "
        f"and the 95 % interval of their difference (Welch). The first line decides, as was fixed before the first full run: "
        f"its lower end is to be above {MARGIN}.",
        "",
        "| KL | mean | 95 % interval | lower end |",
        "|---|---|---|---|",
    ]
    for level, words in levels.items():
        ours, theirs = ([reward_at(fronts[side, seed], level) for seed in seeds] for side in SIDES)
        mean, low, high = welch([a / unit for a in ours], [b / unit for b in theirs])
        answer = "above" if low > MARGIN else "NOT above"
        lines.append(f"| {level:.2f}, {words} | {mean:+.3f} | {low:+.3f} to {high:+.3f} | {answer} {MARGIN} |")
    return [*lines, ""]


def every_seed(
    seeds: list[int], fronts: Fronts, levels: dict[float, str], found: dict[str, dict[str, Any]]
) -> list[str]:
    """Each seed's final policy as it is and at each level of KL."""
    lines = [
        "## Every seed",
        "",
        "At the end of training:",
        "",
        "| seed | reward, Relay | TRL | KL, Relay | TRL | different replies, Relay | TRL |",
        "|---|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        final = [found[f"{side}-{seed}-x{SCALES[-1]}"] for side in SIDES]
        cells = [f"{values[key]:.3f}" for key in ("reward", "kl", "different") for values in final]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    for level, words in levels.items():
        lines += [
            "",
            f"At KL {level:.2f}, {words}:",
            "",
            "| seed | Relay | TRL | difference, sd |",
            "|---|---|---|---|",
        ]
        for seed in seeds:
            ours, theirs = (reward_at(fronts[side, seed], level) for side in SIDES)
            difference = (ours - theirs) / found["base"]["reward_sd"]
            lines.append(f"| {seed} | {ours:.3f} | {theirs:.3f} | {difference:+.3f} |")
    return [*lines, ""]


def along(settings: dict[str, Any], seeds: list[int], found: dict[str, dict[str, Any]]) -> list[str]:
    """Every run's snapshots along the training."""
    head = " | ".join(f"{side} {seed}" for side in ("Relay", "TRL") for seed in seeds)
    lines = ["Along the training, reward (KL), by side and seed:", "", f"| step | {head} |"]
    lines.append("|---|" + "---|" * (2 * len(seeds)))
    for step in settings["snapshots"]:
        values = [found[f"{side}-{seed}-{step}"] for side in SIDES for seed in seeds]
        lines.append(f"| {step} | " + " | ".join(f"{v['reward']:.2f} ({v['kl']:.1f})" for v in values) + " |")
    return [*lines, ""]


def explained(settings: dict[str, Any]) -> list[str]:
    shown = {key: value for key, value in settings.items() if key in SETTINGS and key != "snapshot_every"}
    shown |= {"train_prompts": settings["train_prompts"], "episodes": settings["steps"] * settings["batch"]}
    rows = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in shown.items()}
    return [
        "## Settings, the same on both sides",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()),
        "| others | float32, AdamW, no warm-up, weight decay or gradient clipping, k1 in the reward, advantages whitened over "
        "the batch, rewards not, no EOS penalty |",
        "",
        "Settings are TRL's defaults where they fit, its linear schedule among them. Learning rate, epochs and steps were "
        "chosen on trial runs of TRL alone, so that its reward rises steadily; schedule and KL coefficient so that its "
        "seeds end close to each other, on three other seeds of TRL alone and half the batch.",
        "",
        "## Comparisons before this one",
        "",
        "Two, on earlier settings (constant rate 0.001, KL coefficient 0.2), both inconclusive: at the smallest final KL the "
        "difference was +0.048 (95 % interval -0.103 to +0.199; batch 64, seeds 0 to 4, KL 3.92) and -0.096 (-0.225 to +0.033; "
        "batch 128, seeds 5 to 9, KL 3.15), one slow seed of TRL in the first and one of Relay in the second. Training had "
        "not converged there and seeds of one side differed by 0.1 standard deviations, too much for five of them to tell a "
        "difference of that size from none. These settings, the seeds and the rule were fixed before any run of Relay on them.",
        "",
        "## How it is measured",
        "",
        f"One program measures both sides: {settings['held_out_prompts']} held-out prompts, {SAMPLES} replies each "
        f"({SAMPLES_ALONG} along the training), Hugging Face sampling from the same torch seed. The KL of a reply to the base "
        "is the sum over its tokens of the KL of the whole next-token distribution.",
        "",
        "Two final policies seldom have the same KL. Each is therefore measured with its adapter at "
        f"{', '.join(map(str, SCALES))} of its size, which draws its own front of reward against KL (linear interpolation of "
        "weights towards the base: Ramé et al. 2024, arXiv 2406.16768), and read at the KL in question. The reward where the "
        "run first passed a KL in training says less: on three trial seeds of TRL (48 steps, KL coefficient 0.1) it varied by "
        "0.16 standard deviations at KL 8 and 0.22 at KL 4, these readings by 0.03 and 0.02.",
    ]


def differing() -> list[str]:
    return [
        "## What differs between the implementations",
        "",
        "- **Reward.** TRL takes a reward model and no function: it is given a module whose backbone passes the token ids "
        "on and whose score decodes and calls the rule. Relay's recipe names the function.",
        "- **Critic.** In TRL a second copy of the model, here with an adapter of the same shape and a head drawn from "
        "the same distribution as Relay's; in Relay an adapter and a head on the shared base. TRL weighs the value loss by "
        "`vf_coef`, Relay by 1; the two losses share no parameter, so under AdamW the weight changes little.",
        "- **Padding.** TRL pads prompts on the left and masks; Relay samples and trains without padding between prompt "
        "and reply. TRL gives the score at the token after EOS where there is one, Relay at EOS.",
        "- **Random numbers.** Relay draws each token from a key of seed, step and prompt; TRL from torch's generator. "
        "Order of prompts, adapters' first weights and noise differ, so equal seeds of the two sides are not paired.",
        "- **Program.** Relay runs under the `deepspeed` launcher (ZeRO-0, one rank) and saves hashed checkpoints at the "
        "snapshot steps; TRL runs plainly and saves adapters. Wall times hold all of that and are no benchmark of the "
        "loops.",
    ]


def commit() -> str:
    """The commit the page was made on, marked when the tree had changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
