"""Find the ranks that the others wait for, from the heartbeats of all. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from hg_scale.training.monitoring.heartbeat import PERIOD, HeartbeatRecord

SILENT = 3 * PERIOD  # seconds without a heartbeat
_MAX_NAMED = 8  # ranks named in one line
_ORDER = {"start": 0, "step": 1, "save": 2, "validation": 2, "end": 2}


def stalled_ranks(
    beats: Mapping[int, HeartbeatRecord], per_stage: int, now: float, silent: float = SILENT
) -> list[int]:
    """Return the ranks that the others wait for; none if all are at the same position.

    The first of these criteria that holds for some ranks but not for all decides:

    1. no heartbeat for `silent` seconds (this one may hold for all ranks);
    2. an earlier step or phase, or still reading data, which all ranks do at the same point;
    3. fewer turns than other ranks of the pipeline stage, which has `per_stage` ranks. With more
       than one stage, ranks in local work come first: the others may wait for another stage.
    """
    world = max((beat.world_size for beat in beats.values()), default=0)
    gone = [r for r in range(world) if r not in beats or _is_silent(beats[r], now, silent)]
    if gone:
        return gone
    common = {rank: _common_position(beat) for rank, beat in beats.items()}
    stalled = sorted(rank for rank, position in common.items() if position < max(common.values()))
    if not stalled:
        furthest: dict[int, int] = {}
        for rank, beat in beats.items():
            stage = rank // per_stage
            furthest[stage] = max(furthest.get(stage, 0), beat.turns)
        stalled = sorted(r for r, b in beats.items() if b.turns < furthest[r // per_stage])
        if per_stage < world:
            stalled = [rank for rank in stalled or sorted(beats) if beats[rank].work] or stalled
    return stalled if len(stalled) < world else []


def describe_stalled(
    beats: Mapping[int, HeartbeatRecord], per_stage: int, now: float, silent: float = SILENT
) -> str:
    """Describe the stalled ranks, as `rank 5 (n3) is still reading data`; "" if there are none."""
    groups: dict[str, list[str]] = {}
    for rank in stalled_ranks(beats, per_stage, now, silent):
        beat = beats.get(rank)
        state = _describe_state(beat, now, silent)
        groups.setdefault(state, []).append(f"{rank} ({beat.host})" if beat else str(rank))
    parts = []
    for state, names in groups.items():
        several = len(names) > 1
        if several:
            state = state.replace("is ", "are ", 1).replace("has ", "have ", 1)
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        parts.append(f"rank{'s' * several} {', '.join(names[:_MAX_NAMED])}{more} {state}")
    return ", ".join(parts)


def _common_position(beat: HeartbeatRecord) -> tuple[int, int, int]:
    """Return a position that is comparable between all ranks: two turns of a step read data."""
    return beat.step, _ORDER[beat.phase], min(beat.turns, 2) if beat.phase == "step" else 0


def _describe_state(beat: HeartbeatRecord | None, now: float, silent: float) -> str:
    if beat is None:
        return "has sent no heartbeat"
    if beat.ended:
        return "has ended"
    if _is_silent(beat, now, silent):
        return f"has sent no heartbeat for {now - beat.time:.0f} s"
    if beat.work == "data":
        return "is still reading data"
    if beat.work == "forward":
        return "is still in its forward pass"
    if beat.phase == "step" and beat.turns <= 2:
        return "has not begun its forward pass"
    return f"is still {beat.activity}"


def _is_silent(beat: HeartbeatRecord, now: float, silent: float) -> bool:
    return beat.ended or (now - beat.time > silent and not beat.hung)
