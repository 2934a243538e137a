"""Push refuses what is not proven, says what it would send, and sends exactly that."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest
from cards.paper_checkpoint import edit
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from halfbyte.cards import card, push, upload
from halfbyte.errors import CheckFailed, HalfbyteError, OutputError, SourceError, UsageError

SENT = ["LICENSE", "README.md", "config.json", "halfbyte/plan.json", "halfbyte/quantize.json", "halfbyte/verify.json", "model.safetensors", "tokenizer.json"]  # fmt: skip


class FakeHub:
    """Remembers what it was asked to do, in order."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))

    def upload_file(self, **options: Any) -> None:
        self.calls.append(("upload_file", options))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    monkeypatch.setattr(upload, "hub", lambda: hub)
    return hub


@pytest.fixture
def ready(checkpoint: Path) -> Path:
    card(checkpoint)
    return checkpoint


def test_weights_go_first_and_the_card_last_under_its_new_name(ready: Path, fake: FakeHub) -> None:
    result = push(ready, "org/tiny-nf4-bnb", private=True, message="hello")
    assert [name for name, _ in fake.calls] == ["create_repo", "upload_folder", "upload_file"]
    assert fake.calls[0][1]["private"] is True
    assert fake.calls[1][1]["commit_message"] == "hello"
    assert b'model_id = "org/tiny-nf4-bnb"' in fake.calls[2][1]["path_or_fileobj"]
    assert result["url"] == "https://huggingface.co/org/tiny-nf4-bnb"


def test_card_on_disk_stays_as_it_was(ready: Path, fake: FakeHub) -> None:
    before = (ready / "README.md").read_bytes()
    push(ready, "org/name")
    assert (ready / "README.md").read_bytes() == before


def test_exactly_the_listed_files_pass_the_clients_own_filter(ready: Path, fake: FakeHub) -> None:
    name = "tokenizer[1]*.json"
    (ready / name).write_text("{}")
    edit(ready, "quantize", lambda body: body["companions"].update({name: "78" * 32}))
    result = push(ready, "org/name")
    present = [path.relative_to(ready).as_posix() for path in ready.rglob("*") if path.is_file()]
    assert "README.md" not in fake.calls[1][1]["allow_patterns"]
    sent = set(filter_repo_objects(present, allow_patterns=fake.calls[1][1]["allow_patterns"])) | {"README.md"}
    assert sent == {entry["name"] for entry in result["files"]} == {*SENT, name}
    assert not fnmatch.fnmatch("tokenizer1x.json", fake.calls[1][1]["allow_patterns"][-1])


def test_dry_run_lists_everything_and_asks_no_hub(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "hub", lambda: pytest.fail("dry run asked for the hub"))
    for stray in (".env", "notes.txt", ".halfbyte-work/journal.jsonl", "halfbyte/.verify.json.part"):
        (ready / stray).parent.mkdir(exist_ok=True)
        (ready / stray).write_text("secret")
    result = push(ready, "org/name", dry_run=True)
    assert [entry["name"] for entry in result["files"]] == SENT
    assert result["bytes"] == sum((ready / name).stat().st_size for name in SENT)
    assert result["left_out"] == [".env", ".halfbyte-work/journal.jsonl", "halfbyte/.verify.json.part", "notes.txt"]
    assert result["url"] is None


@pytest.mark.parametrize(
    ("lost", "error", "todo"),
    [
        ("README.md", OutputError, "halfbyte card"),
        ("halfbyte/quantize.json", OutputError, "halfbyte quantize"),
        ("halfbyte/verify.json", CheckFailed, "halfbyte verify"),
        ("model.safetensors", SourceError, "halfbyte quantize"),
        ("tokenizer.json", OutputError, "halfbyte quantize"),
    ],
)
def test_incomplete_checkpoint_is_refused(
    ready: Path, fake: FakeHub, lost: str, error: type[HalfbyteError], todo: str
) -> None:
    (ready / lost).unlink()
    with pytest.raises(error) as caught:
        push(ready, "org/name")
    assert todo in str(caught.value.todo)
    assert fake.calls == []


def test_failed_check_is_refused_by_name(ready: Path, fake: FakeHub) -> None:
    edit(ready, "verify", lambda body: (body.update(passed=False), body["checks"][1].update(status="failed")))
    with pytest.raises(CheckFailed, match="stock transformers loads it"):
        push(ready, "org/name")
    assert fake.calls == []


def test_record_in_which_nothing_passed_proves_nothing(ready: Path, fake: FakeHub) -> None:
    edit(ready, "verify", lambda body: [check.update(status="skipped") for check in body["checks"]])
    with pytest.raises(CheckFailed, match="proves nothing"):
        push(ready, "org/name")


def test_changed_weights_are_refused(ready: Path, fake: FakeHub) -> None:
    with (ready / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match="the quantize record says"):
        push(ready, "org/name", dry_run=True)


@pytest.mark.parametrize("target", ["../elsewhere.json", ".env"])
def test_link_is_not_followed_out_of_the_folder_nor_to_a_dot_file(ready: Path, fake: FakeHub, target: str) -> None:
    (ready / "tokenizer.json").unlink()
    (ready / target).write_text("secret")
    (ready / "tokenizer.json").symlink_to(ready / target)
    with pytest.raises(OutputError, match="no plain file"):
        push(ready, "org/name")


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/hostname"])
def test_recorded_name_that_climbs_out_is_not_sent(ready: Path, fake: FakeHub, name: str) -> None:
    (ready.parent / "tokenizer.json").write_text("{}")
    edit(ready, "quantize", lambda body: body["companions"].update({name: "00"}))
    with pytest.raises(OutputError, match="no plain file"):
        push(ready, "org/name", dry_run=True)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/na me", "../x", "org/"])
def test_repository_name_that_cannot_be_is_a_usage_error(ready: Path, repo: str) -> None:
    with pytest.raises(UsageError):
        push(ready, repo, dry_run=True)


@pytest.mark.parametrize(
    ("status", "todo"), [(401, "hf auth login"), (403, "write access"), (404, "organisation"), (500, "push again")]
)
def test_answer_of_the_hub_becomes_a_sentence(ready: Path, fake: FakeHub, status: int, todo: str) -> None:
    class Response:
        status_code = status
        request = None

    error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
    error.response, error.args = Response(), ("the server's words\nand more",)
    fake.error = error
    with pytest.raises(HalfbyteError, match=str(status)) as caught:
        push(ready, "org/name")
    assert todo in str(caught.value.todo)


@pytest.mark.parametrize(
    ("error", "todo"),
    [
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (ConnectionResetError("reset by peer"), "push again"),
    ],
)
def test_missing_login_and_broken_line_say_what_to_do(ready: Path, fake: FakeHub, error: Exception, todo: str) -> None:
    fake.error = error
    with pytest.raises(HalfbyteError) as caught:
        push(ready, "org/name")
    assert todo in str(caught.value.todo)


def test_the_real_client_has_what_push_calls() -> None:
    import inspect

    from halfbyte.cards.upload import hub

    wanted = {"create_repo": {"repo_type", "private", "exist_ok"}, "upload_folder": {"repo_id", "folder_path", "repo_type", "commit_message", "allow_patterns"}, "upload_file": {"path_or_fileobj", "path_in_repo", "repo_id", "repo_type", "commit_message"}}  # fmt: skip
    for name, parameters in wanted.items():
        assert parameters <= inspect.signature(getattr(hub(), name)).parameters.keys()
