"""The official data sets: checked, read in their archives, downloaded whole or not at all."""

import hashlib
import io
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from data_helpers import files_below, pixels, records
from scipy.io import savemat

from gddim.data import CIFAR10, SVHN, CelebA, official
from gddim.data.files import fetch
from gddim.data.sources import data_folder
from gddim.errors import UserError


def test_cifar10_is_the_official_one(gddim_data):
    train, test = CIFAR10(str(gddim_data)).train(), CIFAR10(str(gddim_data)).test()
    assert (len(train), len(test), train.shape, train.dtype, train.flip) == (
        50_000,
        10_000,
        (32, 32, 3),
        np.uint8,
        True,
    )
    raw = np.fromfile(gddim_data / "cifar-10-batches-bin" / "data_batch_2.bin", np.uint8, 3073)[1:]
    np.testing.assert_array_equal(train[np.array([10_000])][0].transpose(2, 0, 1).ravel(), raw)


@pytest.fixture
def small_cifar(monkeypatch):
    """Batches of two images whose digests pass for the official ones."""
    batches = {name: pixels(i, 2 * 3073).tobytes() for i, name in enumerate(official._BATCH_MD5)}
    digests = {name: hashlib.md5(raw).hexdigest() for name, raw in batches.items()}
    monkeypatch.setattr(official, "_BATCH_MD5", digests)
    return batches


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def test_cifar10_reads_the_archive_in_place_whatever_its_paths(tmp_path, small_cifar):
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    members = [("../../evil.bin", b"evil"), ("/tmp/evil.bin", b"evil")]
    members += [(f"../cifar-10-batches-bin/{name}", raw) for name, raw in small_cifar.items()]
    write_tar(root / "cifar-10-binary.tar.gz", members)
    from_archive = CIFAR10(str(root)).train()
    assert files_below(tmp_path) == ["a/b/cifar-10-binary.tar.gz"]

    unpacked = tmp_path / "cifar-10-batches-bin"
    unpacked.mkdir()
    for name, raw in small_cifar.items():
        (unpacked / name).write_bytes(raw)
    for root in (tmp_path, unpacked):
        np.testing.assert_array_equal(records(CIFAR10(str(root)).train()), records(from_archive))
    assert len(from_archive) == 10
    planes = np.frombuffer(small_cifar["data_batch_1.bin"], np.uint8)[1:3073].reshape(3, 32, 32)
    np.testing.assert_array_equal(records(from_archive)[0, 5, 9], planes[:, 5, 9])


def test_some_files_of_cifar10_are_trained_on_where_not_all_are_there(tmp_path, small_cifar):
    for name in ("data_batch_2.bin", "data_batch_5.bin"):
        (tmp_path / name).write_bytes(small_cifar[name])
    found = records(CIFAR10(str(tmp_path), batches=(5, 2)).train())
    for row, name in ((0, "data_batch_5.bin"), (2, "data_batch_2.bin")):
        planes = np.frombuffer(small_cifar[name], np.uint8)[1:3073].reshape(3, 32, 32)
        np.testing.assert_array_equal(found[row, 5, 9], planes[:, 5, 9])
    assert len(found) == 4
    with pytest.raises(UserError, match=r"has no data_batch_1.bin, data_batch_3.bin, data_batch_4.bin"):
        CIFAR10(str(tmp_path)).train()
    for wrong in ((0,), (6,), (1, 1)):
        with pytest.raises(UserError, match="different numbers from 1 to 5"):
            CIFAR10(str(tmp_path), batches=wrong)


def test_damaged_cifar10_is_named(tmp_path, small_cifar):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, raw in small_cifar.items():
        (folder / name).write_bytes(raw)
    (folder / "data_batch_3.bin").write_bytes(small_cifar["data_batch_3.bin"][:-1])
    with pytest.raises(UserError, match=r"data_batch_3.bin is damaged: 6145 bytes"):
        CIFAR10(str(tmp_path)).train()
    CIFAR10(str(tmp_path)).test()
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"has no data_batch_3.bin"):
        CIFAR10(str(tmp_path)).train()


def test_a_truncated_archive_is_named(tmp_path, small_cifar):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_tar(archive, small_cifar.items())
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"cifar-10-binary.tar.gz is damaged|is damaged: "):
        CIFAR10(str(tmp_path)).train()


def test_pickled_cifar10_is_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match=r"cifar-10-batches-py is pickled, .*cifar-10-binary.tar.gz"):
        CIFAR10(str(tmp_path)).train()


@pytest.mark.parametrize("dataset", [CIFAR10, SVHN, CelebA])
def test_a_missing_root_is_named_and_not_made(tmp_path, dataset, monkeypatch):
    data = dataset(root=str(tmp_path / "nowhere"))  # builds: nothing is read yet
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        data.train()
    monkeypatch.setenv("GDDIM_DATA", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"GDDIM_DATA .*nothing is not a folder"):
        dataset().test()
    assert not list(tmp_path.iterdir())


def test_without_a_root_the_cache_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GDDIM_DATA", "")
    assert data_folder(None) == tmp_path / ".cache" / "gddim"


def test_svhn(tmp_path, monkeypatch):
    images = pixels(0, 32, 32, 3, 5)
    savemat(tmp_path / "train_32x32.mat", {"X": images, "y": np.arange(5)[:, None]})
    with pytest.raises(UserError, match=r"train_32x32.mat is damaged"):
        SVHN(str(tmp_path)).train()
    digest = hashlib.md5((tmp_path / "train_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(official._SVHN_MD5, "train_32x32.mat", digest)
    np.testing.assert_array_equal(records(SVHN(str(tmp_path)).train())[3], images[..., 3])


# Downloads, from a server of our own.

BODY = pixels(0, 300_000).tobytes()
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Sends BODY, from where it is asked to if `ranges`, and hangs up after `limit` bytes."""

    def __init__(self, server, *args, **kwargs):
        self.behaviour = server
        super().__init__(*args, **kwargs)

    def do_GET(self):
        asked = self.headers.get("Range")
        self.behaviour["asked"].append(asked)
        start = int(asked[6:-1]) if asked and self.behaviour["ranges"] else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start : start + self.behaviour["limit"]])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    behaviour = {"ranges": True, "limit": 10**9, "asked": []}
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/file.bin", behaviour
        running.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_completed(tmp_path, server, ranges):
    url, behaviour = server
    behaviour.update(ranges=ranges, limit=100_000)
    with pytest.raises(UserError, match=r"put file.bin into "):
        fetch(url, tmp_path / "file.bin", MD5)
    assert not (tmp_path / "file.bin").exists()
    behaviour["limit"] = 10**9
    fetch(url, tmp_path / "file.bin", MD5)
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert behaviour["asked"] == [None, "bytes=100000-"]
    assert files_below(tmp_path) == [".lock", "file.bin"]
    fetch(url, tmp_path / "file.bin", MD5)
    assert len(behaviour["asked"]) == 2


@pytest.mark.parametrize("rest", [b"not the beginning", BODY, BODY + b"more"])
def test_whatever_lies_in_the_part_file_the_download_ends_right(tmp_path, server, rest):
    (tmp_path / "file.bin.part").write_bytes(rest)
    fetch(server[0], tmp_path / "file.bin", MD5)
    assert (tmp_path / "file.bin").read_bytes() == BODY


def test_a_wrong_digest_leaves_nothing(tmp_path, server):
    with pytest.raises(UserError, match=r"md5"):
        fetch(server[0], tmp_path / "file.bin", "0" * 32)
    assert files_below(tmp_path) == [".lock"]


def test_several_processes_download_once(tmp_path, server):
    url, behaviour = server
    threads = [threading.Thread(target=fetch, args=(url, tmp_path / "file.bin", MD5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert len(behaviour["asked"]) == 1


def test_without_a_network_one_line_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(official, "_CIFAR_URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    with pytest.raises(UserError) as caught:
        CIFAR10(str(tmp_path)).train()
    assert f"put cifar-10-binary.tar.gz into {tmp_path}" in str(caught.value)
    assert "\n" not in str(caught.value)
