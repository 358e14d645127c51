"""TensorBoard: an event file for each trial, in the study's folder.

    tensorboard --logdir STUDY/trackers/tensorboard

Scalars by epoch, at the times that the record knows, the trial's values for the HPARAMS tab, and its status as a text.
An epoch is one entry of the file, so a file that a crash has cut short is cut back to its last whole entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from google.protobuf.struct_pb2 import Value
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter

from lbstudy import storage
from lbstudy.records.folder import StudyFolder
from lbstudy.storage import StoragePath
from lbstudy.trackers import Held
from lbstudy.trackers.trial import Key, TrackedTrial, trackers_folder

FILE = "events.out.tfevents.0.lbstudy"
GOOD = ("completed", "pruned")
FRAME = 8 + 4 + 4  # bytes around an entry: its length and two checksums


class TensorBoard:
    """Event files of a study's trials."""

    at_end = False
    writers = 8

    def __init__(self, folder: StudyFolder):
        self._root = trackers_folder(folder) / "tensorboard"

    @property
    def place(self) -> str:
        """The command that shows them."""
        return f"tensorboard --logdir {self._root}"

    def held(self) -> dict[Key, Held]:
        """What the files say; what a crash has left of an entry is cut off."""
        found = {}
        paths: list[StoragePath] = sorted(self._root.glob(f"*/*/*/{FILE}"))
        for path, content in zip(paths, storage.read_all(paths), strict=True):
            epochs, ended, whole = 0, False, 0
            for event, whole in _events(content):  # noqa: B007
                epochs = max(epochs, event.step)
                ended = ended or any(value.tag == metadata.SESSION_END_INFO_TAG for value in event.summary.value)
            if whole < len(content):
                storage.write(path, content[:whole])
            kind, cell, number = (part.name for part in (path.parent.parent.parent, path.parent.parent, path.parent))
            found[kind, cell, int(number)] = Held(epochs, ended)
        return found

    def write(self, trial: TrackedTrial, after: int) -> None:
        """Add to the trial's file."""
        path = self._root / trial.name / FILE
        events = [] if path.is_file() else _beginning(trial)
        for point in trial.points[after:]:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            events.append(Event(wall_time=point.time, step=point.epoch, summary=Summary(value=values)))
        if trial.has_ended:
            events.append(_end(trial))
        content = BytesIO()
        writer = RecordWriter(content)
        for event in events:
            writer.write(event.SerializeToString())
        storage.make_folder(path.parent)
        storage.append(path, content.getvalue())


def _events(content: bytes) -> Iterator[tuple[Event, int]]:
    """The whole entries of a file, each with the position after it."""
    position = 0
    while position + FRAME <= len(content):
        length = int.from_bytes(content[position : position + 8], "little")
        if position + FRAME + length > len(content):
            return
        event = Event.FromString(content[position + 12 : position + 12 + length])
        position += FRAME + length
        yield event, position


def _beginning(trial: TrackedTrial) -> list[Event]:
    _, cell, _ = trial.key
    start = SessionStartInfo(group_name=trial.name, start_time_secs=trial.began)
    for name, value in (trial.parameters | {"cell": cell}).items():
        kind = "string_value" if isinstance(value, str) else "bool_value" if isinstance(value, bool) else "number_value"
        start.hparams[name].CopyFrom(Value(**{kind: value}))
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_start_info=start)
    version = Event(wall_time=trial.began, file_version="brain.Event:2")
    values = [_hparams(metadata.SESSION_START_INFO_TAG, data)]
    return [version, Event(wall_time=trial.began, summary=Summary(value=values))]


def _end(trial: TrackedTrial) -> Event:
    status = api_pb2.STATUS_SUCCESS if trial.status in GOOD else api_pb2.STATUS_FAILURE
    end = SessionEndInfo(status=status, end_time_secs=trial.ended)
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_end_info=end)
    text = Summary.Value(
        tag="status",
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
        tensor=TensorProto(dtype=DT_STRING, string_val=[trial.status.encode()]),
    )
    values = [text, _hparams(metadata.SESSION_END_INFO_TAG, data)]
    return Event(wall_time=trial.ended, step=len(trial.points), summary=Summary(value=values))


def _hparams(tag: str, data: HParamsPluginData) -> Summary.Value:
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=metadata.NULL_TENSOR)
