"""The table at the end: at most 60 lines, failures first."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .records import FAILURES, Record, Status

__all__ = ["FIGURES", "describe", "failures", "latest", "lines"]

FIGURES = {"comparison", "compilation", "kernels", "pytest"}
"""Tables whose records are results of cases, or of several, and no cases themselves."""
LINES = 60
WIDTH = 240


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of every case: a later call may have settled what an earlier one left or failed."""
    return list({(record.stage, record.case): record for record in records}.values())


def lines(records: Sequence[Record], stages: Sequence[str], troubles: Sequence[str] = ()) -> list[str]:
    """The table.

    Args:
        records: of all stages.
        stages: their names, in order.
        troubles: what went wrong outside the stages, in a line each.
    """
    now = latest(records)
    failed = [*troubles, *(_failure(record) for record in now if record.status in FAILURES)]
    width = 2 + max(map(len, ("stage", *stages)))
    table = [_row(name, now, width) for name in stages]
    highlights = [f"{record.stage}: {record.text}" for record in now if record.highlight and record.status not in FAILURES]
    # What fails most often fails for one reason: a part of the failures is enough, and the results need some room, too.
    room = LINES - len(table) - 2
    shown = failed if len(failed) + len(highlights) <= room else failed[: max(room - min(len(highlights), room // 2) - 1, 1)]
    if len(shown) < len(failed):
        shown = [*shown, f"... and {len(failed) - len(shown)} more: failures.txt"]
    rest = LINES - len(shown) - len(table) - 1
    if len(highlights) > rest:
        highlights = [*highlights[: rest - 1], f"... and {len(highlights) - rest + 1} more: results.jsonl"]
    heading = f"{'stage':<{width}}{'status':<10}{'seconds':>8}{'ok':>7}{'failed':>8}{'skipped':>9}{'left':>7}"
    return [line[:WIDTH] for line in (*shown, heading, *table, *highlights)]


def failures(records: Iterable[Record]) -> str:
    """All failures, with their details."""
    return "\n".join(f"{_failure(record)}\n{record.detail}" for record in latest(records) if record.status in FAILURES)


def describe(records: Iterable[Record], stage: str) -> str:
    """How a stage ended, in a few words."""
    now = [record for record in latest(records) if record.stage == stage]
    whole = next((record for record in now if not record.case), None)
    said = ", ".join(f"{count} {status}" for status, count in sorted(_counts(now).items()))
    if whole is None:
        return said or "nothing"
    return f"{whole.text or _status(now)}{f' ({said})' if said else ''}"


def _row(stage: str, records: Iterable[Record], width: int) -> str:
    of_stage = [record for record in records if record.stage == stage]
    whole = next((record for record in of_stage if not record.case), None)
    counts = _counts(of_stage)
    failed = counts["failed"] + counts["wrong"]
    status = _status(of_stage)
    seconds = "" if whole is None or whole.seconds is None else f"{whole.seconds:.1f}"
    numbers = f"{counts['ok']:>7}{failed:>8}{counts['skipped']:>9}{counts['left']:>7}"
    return f"{stage:<{width}}{status:<10}{seconds:>8}{numbers}"


def _counts(records: Iterable[Record]) -> Counter[Status]:
    return Counter(record.status for record in records if record.case and (record.table not in FIGURES or record.status in FAILURES))


def _status(of_stage: Sequence[Record]) -> str:
    whole = next((record for record in of_stage if not record.case), None)
    if whole is None:
        return "not run"
    return "failed" if whole.status == "ok" and any(record.status in FAILURES for record in of_stage) else whole.status


def _failure(record: Record) -> str:
    word = "WRONG" if record.status == "wrong" else "FAILED"
    return f"{word} {record.stage}{f' / {record.case}' if record.case else ''}: {record.text}"
