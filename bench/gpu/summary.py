"""The final table: at most 60 lines, failures first."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .records import FAILURES, Record, Status

__all__ = ["NOT_CASES", "describe", "failures", "latest", "lines"]

NOT_CASES = {"comparison", "compilation", "kernels", "pytest"}
"""Tables whose records are not counted as cases, because they summarize cases."""
LINES = 60
WIDTH = 240


def latest(records: Iterable[Record]) -> list[Record]:
    """Return the last record of every case: a later call may have completed a case that an earlier one left or failed."""
    return list({(record.stage, record.case): record for record in records}.values())


def lines(records: Sequence[Record], stages: Sequence[str], problems: Sequence[str] = ()) -> list[str]:
    """Return the lines of the table.

    Args:
        records: records of all stages.
        stages: names of the stages, in order.
        problems: errors outside the stages, one line each.
    """
    now = latest(records)
    failed = [*problems, *(_failure(record) for record in now if record.status in FAILURES)]
    width = 2 + max(map(len, ("stage", *stages)))
    table = [_row(name, now, width) for name in stages]
    highlights = [f"{record.stage}: {record.text}" for record in now if record.highlight and record.status not in FAILURES]
    # Most failures have one cause: some of them are enough, and the results need lines, too.
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
    """Return all failures, with their details."""
    return "\n".join(f"{_failure(record)}\n{record.detail}" for record in latest(records) if record.status in FAILURES)


def describe(records: Iterable[Record], stage: str) -> str:
    """Return in a few words how a stage ended."""
    now = [record for record in latest(records) if record.stage == stage]
    whole = next((record for record in now if not record.case), None)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(_counts(now).items()))
    if whole is None:
        return counts or "nothing"
    return f"{whole.text or _status(now)}{f' ({counts})' if counts else ''}"


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
    return Counter(record.status for record in records if record.case and (record.table not in NOT_CASES or record.status in FAILURES))


def _status(of_stage: Sequence[Record]) -> str:
    whole = next((record for record in of_stage if not record.case), None)
    if whole is None:
        return "not run"
    return "failed" if whole.status == "ok" and any(record.status in FAILURES for record in of_stage) else whole.status


def _failure(record: Record) -> str:
    word = "WRONG" if record.status == "wrong" else "FAILED"
    return f"{word} {record.stage}{f' / {record.case}' if record.case else ''}: {record.text}"
