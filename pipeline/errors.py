"""The one kind of error a user's mistake raises: what, where, what was expected, and the fix. It exits with code 2."""

EXIT_USER_ERROR = 2
"""Exit code of a mistake the user can fix (bad recipe, bad data, altered checkpoint)."""

EXIT_TROUBLE = 3
"""Exit code of a training that went wrong by itself (NaN, a reward source that fails, a signal the recipe stops on)."""

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop, saved a checkpoint and can be resumed (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """A mistake the user can fix; printed as one paragraph, never as a traceback.

    `where` names the thing (file, key, row, rank), `found` what is wrong with it, `expected` what should be there
    and `fix` what to do.
    """

    def __init__(self, where: str, found: str, *, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        lines = [f"{where}: {found}"]
        if expected:
            lines.append(f"  expected {expected}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))


class Trouble(Exception):
    """Training cannot go on: not the recipe but the numbers or a reward source are at fault. It exits with code 3.

    Every rank raises it at the same place. `what` is one paragraph that names the stage's step and the cause; the last
    complete checkpoint stays as it is.
    """
