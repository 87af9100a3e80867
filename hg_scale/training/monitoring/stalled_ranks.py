"""Which ranks the others wait for, from what each last said of itself. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from hg_scale.training.monitoring.heartbeat import PERIOD, HeartbeatRecord

SILENT = 3 * PERIOD  # seconds
_NAMED = 8  # ranks named in one line
_ORDER = {"start": 0, "step": 1, "save": 2, "validation": 2, "end": 2}


def stalled_ranks(
    beats: Mapping[int, HeartbeatRecord], per_stage: int, now: float, silent: float = SILENT
) -> list[int]:
    """The ranks that had not arrived where the others wait; none where all are at one place.

    Whoever gives no sign of life comes first: `silent` is for how long that may be. Then who is in
    an earlier step, phase or reading of data, which all ranks go through alike; then who is behind
    the other ranks of its pipeline stage, which has `per_stage` of them: there, and between stages,
    who works by itself comes before who may wait for another stage.
    """
    world = max((beat.world_size for beat in beats.values()), default=0)
    gone = [r for r in range(world) if r not in beats or _is_silent(beats[r], now, silent)]
    if gone:
        return gone
    common = {rank: _common_place(beat) for rank, beat in beats.items()}
    late = sorted(rank for rank, place in common.items() if place < max(common.values()))
    if not late:
        furthest: dict[int, int] = {}
        for rank, beat in beats.items():
            stage = rank // per_stage
            furthest[stage] = max(furthest.get(stage, 0), beat.turns)
        late = sorted(r for r, b in beats.items() if b.turns < furthest[r // per_stage])
        if per_stage < world:
            late = [rank for rank in late or sorted(beats) if beats[rank].work] or late
    return late if len(late) < world else []


def describe_stalled(
    beats: Mapping[int, HeartbeatRecord], per_stage: int, now: float, silent: float = SILENT
) -> str:
    """In words, as in `rank 5 (n3) is still reading data`; "" where none is late."""
    groups: dict[str, list[str]] = {}
    for rank in stalled_ranks(beats, per_stage, now, silent):
        beat = beats.get(rank)
        what = _what(beat, now, silent)
        groups.setdefault(what, []).append(f"{rank} ({beat.host})" if beat else str(rank))
    parts = []
    for what, names in groups.items():
        several = len(names) > 1
        if several:
            what = what.replace("is ", "are ", 1).replace("has ", "have ", 1)
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        parts.append(f"rank{'s' * several} {', '.join(names[:_NAMED])}{more} {what}")
    return ", ".join(parts)


def _common_place(beat: HeartbeatRecord) -> tuple[int, int, int]:
    """As far as it means the same for all ranks: the first two turns of a step read data."""
    return beat.step, _ORDER[beat.phase], min(beat.turns, 2) if beat.phase == "step" else 0


def _what(beat: HeartbeatRecord | None, now: float, silent: float) -> str:
    if beat is None:
        return "has given no sign of life"
    if beat.ended:
        return "has ended"
    if _is_silent(beat, now, silent):
        return f"has given no sign of life for {now - beat.time:.0f} s"
    if beat.work == "data":
        return "is still reading data"
    if beat.work == "forward":
        return "is still in its forward pass"
    if beat.phase == "step" and beat.turns <= 2:
        return "has not begun its forward pass"
    return f"is still {beat.doing}"


def _is_silent(beat: HeartbeatRecord, now: float, silent: float) -> bool:
    return beat.ended or (now - beat.time > silent and not beat.hung)
