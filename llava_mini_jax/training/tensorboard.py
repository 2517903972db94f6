"""TensorBoard's event file of a stage, written by the thread that asks for it.

tensorboardX's own SummaryWriter writes from another one, which a full disk ends without a word:
what is put into its queue then waits for ever, and the run with it.
"""

import time
from collections.abc import Mapping
from typing import Any

from etils import epath


class Board:
    """Scalars by step; those after `first_step` of an interrupted run are forgotten.

    Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._proto: Any = event_pb2  # its classes are made when it is imported
        self._writer = EventsWriter(str(folder / "events"))
        # At START TensorBoard forgets what an earlier writer put at this step or behind it.
        begun = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._writer.write_event(self._proto.Event(step=first_step + 1, session_log=begun))

    def add(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            event = dict(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(self._proto.Event(**event))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
