"""Frames of batches from DALI's graph, which works one batch ahead in a process that can be replaced."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from discovla.batch import BadClip
from discovla.data.dali.graph import GraphItem, device_of, make_frames
from discovla.data.dali.plans import Plan
from discovla.data.dali.reader import leave_to_pyav
from discovla.data.dali.support import DaliSettings, missing
from discovla.data.sandbox import Sandbox, WorkerLost
from discovla.data.video.errors import DecodeError

Made = tuple[Tensor, list[str | None]]


class DaliFrames:
    """Frames of planned clips.

    The graph runs in another process, that a clip may hang or crash without more harm than its own loss.  On
    a GPU frames do not leave its memory on their way here.

    Args:
        instead: what reads a clip that the graph does not, where its plan says so.

    Raises:
        ValueError: DALI is not there.
    """

    def __init__(self, settings: DaliSettings, instead: Any | None = None) -> None:
        lacking = missing()
        if lacking is not None:
            raise ValueError(f"decoder: {lacking}")
        self.settings, self.instead = settings, instead
        self._worker: Sandbox[GraphItem, Any] = Sandbox(make_frames, limit=settings.limit)

    def read(self, plans: Sequence[Plan]) -> Made:
        """The frames of clips, b f y x 3 uint8 on the device, and of each why it has none, or None.

        Rows are black where a clip has fewer frames or none.

        Raises:
            RuntimeError: DALI's graph cannot be built here.
        """
        self._give(plans)
        return self._taken(plans)

    def finished(self, batches: Iterable[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
        """Batches with frames in place of plans: while one is used, the graph works on the next."""
        ahead: dict[str, Any] | None = None
        try:
            for fields in batches:
                last, ahead = ahead, None
                made = None if last is None else _merged(last, self._taken(last["frames"]))
                self._give(fields["frames"])
                ahead = fields
                if made is not None:
                    yield made
            if ahead is not None:
                last, ahead = ahead, None
                yield _merged(last, self._taken(last["frames"]))
        finally:
            if ahead is not None:  # left in the middle, with an answer still to come
                self._taken(ahead["frames"])

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _give(self, plans: Sequence[Plan]) -> None:
        told = (replace(plan, asked=None, made=None) for plan in plans)
        self._worker.give(GraphItem(settings=self.settings, plans=tuple(told)))

    def _taken(self, plans: Sequence[Plan]) -> Made:
        """The answer to the plans given, with what others are to read."""
        frames, reasons = self._answer(plans)
        for row, plan in enumerate(plans):
            made, reason = plan.made, reasons[row]
            if reason is not None and plan.asked is not None and self.instead is not None:
                leave_to_pyav(plan.path, reason)
                try:
                    made, reasons[row] = self.instead.sample(*plan.asked)[0], None
                except DecodeError as error:
                    reasons[row] = error.reason
            if made is not None:
                frames[row] = torch.from_numpy(made)
        return frames, reasons

    def _answer(self, plans: Sequence[Plan]) -> Made:
        """The answer of the graph to the plans given."""
        made, error = self._worker.answer()
        if isinstance(error, WorkerLost):
            return self._one_by_one(plans, error)
        if error is not None:
            raise error
        assert made is not None, "the process gives frames or an error"
        frames, reasons = made
        if isinstance(frames, Tensor):  # of the other process, which will overwrite it
            frames = frames.clone()
            torch.cuda.synchronize(frames.device)
            return frames, reasons
        return torch.from_numpy(frames), reasons

    def _one_by_one(self, plans: Sequence[Plan], error: WorkerLost) -> Made:
        """The frames of clips of which one was too much for the process."""
        if len(plans) == 1:
            side = self.settings.image_size
            black = torch.zeros(1, self.settings.frames, side, side, 3, dtype=torch.uint8)
            return black.to(device_of(self.settings)), [f"not decoded: {error}"]
        made = []
        for plan in plans:
            self._give([plan])
            made.append(self._answer([plan]))  # what others are to read is told by whoever asked for all
        return torch.cat([frames for frames, _ in made]), [reasons[0] for _, reasons in made]


def _merged(fields: dict[str, Any], made: Made) -> dict[str, Any]:
    """The fields of a batch with its frames, and with the clips that the graph could not read marked."""
    frames, reasons = made
    failed = (~fields["valid"]).nonzero().flatten().tolist()
    bad = dict(zip(failed, fields["bad"], strict=True))
    mask = fields["frame_mask"].clone()
    for row, reason in enumerate(reasons):
        if reason is not None:
            plan: Plan = fields["frames"][row]
            bad[row] = BadClip(id=plan.id, video=str(plan.path), reason=reason)
            frames[row], mask[row] = 0, True  # as every row that is not valid
    valid = torch.tensor([row not in bad for row in range(len(reasons))])
    told = tuple(bad[row] for row in sorted(bad))
    return fields | {"frames": frames, "frame_mask": mask, "valid": valid, "bad": told}
