"""Fetching a wheel's kernel files: found, checked, cached; and everything that must be refused."""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import fake_vllm
import pytest

from m3check.kernels import pip as pip_module
from m3check.kernels import wheelfile, wheels
from m3check.kernels.project import VLLM
from m3check.types import M3CheckError

VERSION = "0.99.0"
TREE = "vllm/models/minimax_m3/"
ADDRESS = pip_module.address


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """A package index that is a folder, an empty cache, and no other place to get a wheel from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pip_module, "address", lambda _project, version: (folder / fake_vllm.wheel_name(version)).as_uri())
    return folder


@pytest.fixture
def pip(index, monkeypatch):
    """The real pip resolves, which takes a second or two; elsewhere its answer is taken for granted."""
    monkeypatch.setattr(pip_module, "address", ADDRESS)


def known(contents):
    return {path: hashlib.sha256(text.encode()).hexdigest() for path, text in contents.items() if path.startswith(TREE)}


def without_network(monkeypatch):
    def connect(*_):
        raise AssertionError("connected")

    monkeypatch.setattr(wheels, "_fetch", connect)


def test_only_the_kernel_files_are_taken_and_checked(index, pip):
    fake_vllm.wheel(index, VERSION, {**fake_vllm.files(), "vllm/other.py": "x", "other/vllm.py": "x"})
    files = wheels.published(VLLM, VERSION)
    assert files.version == VERSION
    assert dict(files.hashes) == known(fake_vllm.files())
    on_disk = {p.relative_to(files.folder).as_posix() for p in files.folder.rglob("*") if p.is_file()}
    assert on_disk == {*files.hashes, f"vllm-{VERSION}.dist-info/RECORD"}
    assert [p.name for p in wheels.cache_folder().iterdir()] == [f"vllm-{VERSION}"], "a temporary folder was left"


def test_a_version_without_shipped_hashes_is_said_and_one_with_them_is_not(index, monkeypatch):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    assert "RECORD only" in wheels.published(VLLM, VERSION).warnings[0]
    monkeypatch.setattr(wheelfile, "known_versions", lambda _project: {VERSION: known(fake_vllm.files())})
    assert wheels.published(VLLM, VERSION).warnings == ()


def test_a_short_version_is_told_by_its_full_name(index, pip):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    assert wheels.published(VLLM, "0.99").version == VERSION


def test_the_cache_serves_offline_without_connecting(index, monkeypatch):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    first = wheels.published(VLLM, VERSION)
    without_network(monkeypatch)
    assert wheels.published(VLLM, VERSION, offline=True).hashes == first.hashes
    assert wheels.published(VLLM, VERSION).hashes == first.hashes


def test_offline_with_an_empty_cache_is_a_sentence(monkeypatch):
    without_network(monkeypatch)
    with pytest.raises(M3CheckError, match=r"not in the cache .*--offline forbids .*cached: none"):
        wheels.published(VLLM, VERSION, offline=True)


# What must be refused.


def test_a_member_that_is_not_what_record_says_is_refused_and_not_cached(index):
    honest = fake_vllm.files()
    path = f"{fake_vllm.OPS}/index_topk.py"
    fake_vllm.wheel(index, VERSION, {**honest, path: honest[path] + "\n# and more"}, recorded=honest)
    with pytest.raises(M3CheckError, match=r"index_topk\.py is not what vllm 0\.99\.0's RECORD says"):
        wheels.published(VLLM, VERSION)
    assert list(wheels.cache_folder().iterdir()) == []


def test_a_known_version_with_other_files_is_refused_even_when_record_agrees(index, monkeypatch):
    fake_vllm.wheel(index, VERSION, fake_vllm.files(mark=2.0))
    monkeypatch.setattr(wheelfile, "known_versions", lambda _project: {VERSION: known(fake_vllm.files(mark=1.0))})
    with pytest.raises(M3CheckError, match=r"not the file that vllm 0\.99\.0 was published with"):
        wheels.published(VLLM, VERSION)
    assert list(wheels.cache_folder().iterdir()) == []


@pytest.mark.parametrize("path", [TREE + "../../../evil.py", TREE + "a\\..\\b.py", TREE + "c:evil.py", TREE + "x/../y.py"])
def test_a_member_outside_its_folder_is_refused(index, path, tmp_path):
    fake_vllm.wheel(index, VERSION, {**fake_vllm.files(), path: "evil = True"})
    with pytest.raises(M3CheckError, match="outside its folder"):
        wheels.published(VLLM, VERSION)
    assert not list(tmp_path.rglob("evil.py"))


def test_a_record_that_names_a_place_outside_is_refused(index):
    fake_vllm.wheel(index, VERSION, fake_vllm.files(), recorded={TREE + "../../evil.py": "x"})
    with pytest.raises(M3CheckError, match="outside its folder"):
        wheels.published(VLLM, VERSION)


def test_a_file_that_record_has_and_the_wheel_has_not_is_refused(index):
    fake_vllm.wheel(index, VERSION, fake_vllm.files(), recorded={TREE + "more.py": "x"})
    with pytest.raises(M3CheckError, match=r"lacks vllm/models/minimax_m3/more\.py"):
        wheels.published(VLLM, VERSION)


def test_a_wheel_without_record_is_refused(index):
    path = fake_vllm.wheel(index, VERSION, fake_vllm.files(), record=False)
    with pytest.raises(M3CheckError, match="has no RECORD"):
        wheels.unpacked(VLLM, path)


def test_a_huge_member_is_refused(index):
    fake_vllm.wheel(index, VERSION, {**fake_vllm.files(), TREE + "big.py": "#" * (wheelfile.LARGEST_FILE + 1)})
    with pytest.raises(M3CheckError, match=r"big\.py claims \d+ bytes"):
        wheels.published(VLLM, VERSION)


def test_a_wheel_without_the_kernels_lists_the_versions_that_have_them(index):
    fake_vllm.wheel(index, "0.23.0", {"vllm/__init__.py": ""})
    with pytest.raises(M3CheckError, match=r"no MiniMax-M3 kernels.*0\.24\.0, 0\.25\.0.*0\.33\.0"):
        wheels.published(VLLM, "0.23.0")


def test_an_unknown_version_lists_the_versions_there_are(index, pip):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    with pytest.raises(M3CheckError, match=r"there is no vllm 0\.98\.0; .*0\.33\.0, 0\.99\.0"):
        wheels.published(VLLM, "0.98.0")


def test_an_index_that_does_not_answer_is_a_sentence(pip):
    with pytest.raises(M3CheckError, match=r"pip could not find vllm==0\.99\.0 \(is the network reachable\?\)"):
        wheels.published(VLLM, VERSION)


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    for name, words in (
        ("vllm-1.0-py3-none-any.whl", "cannot read the wheel"),
        ("other.whl", "not named like a vllm wheel"),
    ):
        (tmp_path / name).write_text("no zip")
        with pytest.raises(M3CheckError, match=words):
            wheels.unpacked(VLLM, tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_a_sentence(index, tmp_path, monkeypatch):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    (tmp_path / "sealed").mkdir(mode=0o500)
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path / "sealed"))
    with pytest.raises(M3CheckError, match=r"cannot write to the cache .*set M3CHECK_CACHE"):
        wheels.published(VLLM, VERSION)


def test_a_cache_that_is_a_file_is_a_sentence(index, tmp_path, monkeypatch):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("M3CHECK_CACHE", str(tmp_path / "file"))
    with pytest.raises(M3CheckError, match=r"cannot write to the cache .*set M3CHECK_CACHE"):
        wheels.published(VLLM, VERSION)


# The cache under change and competition.


def test_a_cached_file_that_changed_is_fetched_anew_and_refused_offline(index):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    files = wheels.published(VLLM, VERSION)
    changed = files.folder / fake_vllm.OPS / "sparse_attn.py"
    changed.write_text("evil = True")
    with pytest.raises(M3CheckError, match=r"sparse_attn\.py is not what"):
        wheels.published(VLLM, VERSION, offline=True)
    again = wheels.published(VLLM, VERSION)
    assert "fetched anew" in again.warnings[0]
    assert changed.read_text() == fake_vllm.files()[f"{fake_vllm.OPS}/sparse_attn.py"]


def test_a_file_added_to_the_cache_is_seen(index):
    fake_vllm.wheel(index, VERSION, fake_vllm.files())
    files = wheels.published(VLLM, VERSION)
    (files.folder / fake_vllm.OPS / "added.py").write_text("evil = True")
    with pytest.raises(M3CheckError, match=r"added\.py is not what"):
        wheels.published(VLLM, VERSION, offline=True)


def test_two_at_once_leave_one_whole_copy(index, monkeypatch):
    path = fake_vllm.wheel(index, VERSION, fake_vllm.files())
    together = threading.Barrier(2, timeout=20)

    def fetch(_project, _version, target, _warnings):
        wheelfile.extract_wheel(VLLM, path, target)
        together.wait()

    monkeypatch.setattr(wheels, "_fetch", fetch)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: wheels.published(VLLM, VERSION), range(2))
    assert first.folder == second.folder
    assert first.hashes == second.hashes == known(fake_vllm.files())
    assert [p.name for p in wheels.cache_folder().iterdir()] == [f"vllm-{VERSION}"]


def test_a_fetch_that_breaks_off_leaves_nothing(index, monkeypatch):
    path = fake_vllm.wheel(index, VERSION, fake_vllm.files())

    def fetch(_project, _version, target, _warnings):
        wheelfile.extract_wheel(VLLM, path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_fetch", fetch)
    with pytest.raises(KeyboardInterrupt):
        wheels.published(VLLM, VERSION)
    assert list(wheels.cache_folder().iterdir()) == []


def test_a_users_wheel_may_differ_from_the_published_one_and_says_so(tmp_path, monkeypatch):
    path = fake_vllm.wheel(tmp_path / "mine", VERSION, fake_vllm.files(mark=2.0))
    monkeypatch.setattr(wheelfile, "known_versions", lambda _project: {VERSION: known(fake_vllm.files(mark=1.0))})
    files = wheels.unpacked(VLLM, path)
    assert "is not the published vllm 0.99.0: 1 kernel file(s) differ" in files.warnings[0]
    assert wheels.unpacked(VLLM, path).folder == files.folder
    shutil.copy(fake_vllm.wheel(tmp_path / "other", VERSION, fake_vllm.files(mark=3.0)), path)
    assert wheels.unpacked(VLLM, path).folder != files.folder


# Over HTTP: a server on this machine, with and without range requests.


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A server of one folder that can send parts of a file, and counts the bytes of those."""

    ranges = True
    sent: list[int]

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.translate_path(self.path)
        wanted = self.headers.get("Range")
        if not self.ranges or not wanted or not os.path.isfile(path):
            return super().do_GET()
        with open(path, "rb") as file:
            data = file.read()
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else len(data) - int(last)
        stop = min(int(last), len(data) - 1) if first and last else len(data) - 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.send_header("Content-Length", str(stop - start + 1))
        self.end_headers()
        self.wfile.write(data[start : stop + 1])
        self.sent.append(stop - start + 1)
        return None


@pytest.fixture(params=[True, False], ids=["ranges", "no_ranges"])
def server(request, index, pip, monkeypatch):
    handler = type("Handler", (Ranges,), {"ranges": request.param, "sent": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(index))) as running:
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{running.server_port}/")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield handler
        running.shutdown()


def test_a_wheel_is_read_in_parts_where_the_server_can_and_whole_where_it_cannot(server, index):
    path = fake_vllm.wheel(index, VERSION, fake_vllm.files())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("vllm/_C.so", os.urandom(1 << 20))
    files = wheels.published(VLLM, VERSION)
    assert dict(files.hashes) == known(fake_vllm.files())
    whole = any("the whole wheel was downloaded" in warning for warning in files.warnings)
    assert whole is not server.ranges
    if server.ranges:
        assert 0 < sum(server.sent) < path.stat().st_size / 4


# The published versions.


def test_the_shipped_hashes_are_of_the_published_versions():
    versions = wheelfile.known_versions(VLLM)
    assert list(versions) == ["0.24.0", "0.25.0", "0.25.1", "0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0",
                              "0.31.0", "0.32.0", "0.33.0"]  # fmt: skip
    for hashes in versions.values():
        assert {f"{fake_vllm.OPS}/{name}.py" for name in ("index_topk", "sparse_attn")} <= set(hashes)
        assert all(path.startswith(VLLM.wanted) and len(digest) == 64 for path, digest in hashes.items())


@pytest.mark.network
def test_the_published_0_33_0_is_what_m3check_ships_hashes_of(pip, monkeypatch):
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name)
    files = wheels.published(VLLM, "0.33.0")
    assert dict(files.hashes) == wheelfile.known_versions(VLLM)["0.33.0"]
    assert files.warnings == ()
    assert wheels.published(VLLM, "0.33.0", offline=True).hashes == files.hashes
