"""TensorBoard's event files, read back by TensorBoard itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lbstudy.storage import ObjectPath, StoragePath
from lbstudy.trackers.sync import Sync
from tests.records.test_storage import credentials, endpoint, place  # noqa: F401  # fixtures
from tests.trackers.made_up import BEGAN, add_epoch, make_mixed

pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lbstudy.trackers import Held
from lbstudy.trackers.tensorboard import FILE, TensorBoard

RUN = "sgd-b32-none"


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def curve(folder: Path, tag: str = "val_loss") -> list[tuple[int, float, float]]:
    return [(event.step, event.wall_time, event.value) for event in read(folder).Scalars(tag)]


def hparams(folder: Path) -> dict[str, HParamsPluginData]:
    found = read(folder).SummaryMetadata
    tags = (metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
    values = {tag: found(tag).plugin_data.content for tag in tags if tag in read(folder).PluginTagToContent("hparams")}
    return {tag: HParamsPluginData.FromString(content) for tag, content in values.items()}


def test_curves_values_and_status_read_back(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    Sync(folder, TensorBoard(folder)).once()
    root = tmp_path / "s" / "trackers" / "tensorboard"
    losses = [1, 0.5, pytest.approx(1 / 3), 0.25]
    assert curve(root / "trials" / RUN / "0000") == [(n + 1, BEGAN + 2 * (n + 1), losses[n]) for n in range(4)]
    assert curve(root / "confirm" / RUN / "0000") == curve(root / "trials" / RUN / "0000")
    assert [step for step, *_ in curve(root / "trials" / RUN / "0003")] == [1, 2, 3]
    assert set(read(root / "trials" / RUN / "0000").Tags()["scalars"]) == {"epoch", "val_loss", "seconds"}
    for number, status in enumerate(["completed", "pruned", "diverged"]):
        (text,) = read(root / "trials" / RUN / f"000{number}").Tensors("status")
        assert text.tensor_proto.string_val == [status.encode()]
        told = hparams(root / "trials" / RUN / f"000{number}")
        start, end = told[metadata.SESSION_START_INFO_TAG].session_start_info, told[metadata.SESSION_END_INFO_TAG]
        assert start.hparams["learning_rate"].number_value == 0.1 + number
        assert start.hparams["cell"].string_value == RUN
        good = api_pb2.STATUS_FAILURE if status == "diverged" else api_pb2.STATUS_SUCCESS
        assert end.session_end_info.status == good
    assert metadata.SESSION_END_INFO_TAG not in hparams(root / "trials" / RUN / "0003")


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob(FILE)}


def test_it_knows_what_its_files_hold(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    Sync(folder, TensorBoard(folder)).once()
    before = files(tmp_path)
    assert len(before) == 5
    found = TensorBoard(folder).held()
    assert found["trials", RUN, 3] == Held(3, ended=False)
    assert found["confirm", RUN, 0] == Held(4, ended=True)
    Sync(folder, TensorBoard(folder)).once()
    assert files(tmp_path) == before


@pytest.mark.parametrize("left", [1, 15, 40, 200])
def test_a_file_that_was_cut_short_is_mended(left: int, tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    Sync(folder, TensorBoard(folder)).once()
    whole = files(tmp_path)
    name = f"s/trackers/tensorboard/trials/{RUN}/0000/{FILE}"
    (tmp_path / name).write_bytes(whole[name][:-left])
    Sync(folder, TensorBoard(folder)).once()
    assert files(tmp_path) == whole


def test_a_running_trial_grows_in_its_file(tmp_path: Path):
    folder = make_mixed(tmp_path / "s")
    sync = Sync(folder, TensorBoard(folder))
    sync.once()
    running = folder.trials()[3]
    add_epoch(folder, running, 4)
    Sync(folder, TensorBoard(folder)).once()  # another process
    path = tmp_path / "s" / "trackers" / "tensorboard" / "trials" / RUN / "0003"
    assert [step for step, *_ in curve(path)] == [1, 2, 3, 4]
    running.status = "pruned"
    folder.write_trial(running)
    Sync(folder, TensorBoard(folder)).once()
    assert [step for step, *_ in curve(path)] == [1, 2, 3, 4]
    assert read(path).Tensors("status")[0].tensor_proto.string_val == [b"pruned"]


def test_a_study_in_an_object_store_has_the_same_files(place: ObjectPath, tmp_path: Path):  # noqa: F811
    def content(path: StoragePath) -> Iterator[bytes]:
        return (file.read_bytes() for file in sorted(path.glob(f"trackers/tensorboard/*/*/*/{FILE}")))

    here, there = make_mixed(tmp_path / "s"), make_mixed(place / "s")
    for folder in (here, there):
        Sync(folder, TensorBoard(folder)).once()
        running = folder.trials()[3]
        add_epoch(folder, running, 4)
        Sync(folder, TensorBoard(folder)).once()
    assert list(content(there.path)) == list(content(here.path))
    assert len(list(content(there.path))) == 5
