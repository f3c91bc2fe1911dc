"""Training of draft maps: the frozen model's pseudo rows, the regression, tuning and its interruption, accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from scrimp.methods.draft_training import Counter, FrozenModel, Moments, Tuner, Tuning, stages
from scrimp.methods.draft_training.tuning import divergence
from scrimp.methods.generation import generate
from scrimp.methods.tree_decoding.maps import units

D, V = 24, 32
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": D, "intermediate_size": 32, "num_attention_heads": 4}


def llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(1)
    heads = {"num_key_value_heads": 2, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, initializer_range=0.3, eos_token_id=None)).eval()


def texts(count: int = 6, length: int = 40) -> list[Tensor]:
    return list(torch.randint(V, (count, length), generator=torch.Generator().manual_seed(2)))


def maps(k: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(k, D, D) / D**0.5, torch.randn(k, D)


def test_a_reading_is_the_models_own() -> None:
    model, tokens = llama(), texts(1)[0]
    text = FrozenModel(model).read(tokens)
    with torch.no_grad():
        wanted = model(tokens[None], output_hidden_states=True)
    torch.testing.assert_close(FrozenModel(model).logits(text.states[-1]), wanted.logits[0], rtol=1e-4, atol=1e-4)
    for own, other in zip(text.states[:-1], wanted.hidden_states, strict=False):
        torch.testing.assert_close(own, other[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pseudo_rows_continue_the_text_up_to_their_row(layer: int) -> None:
    """A row's are the same where the text ends with it; maps that know the next tokens give the model's own states."""
    model, tokens = FrozenModel(llama()), texts(1)[0]
    text, rows = model.read(tokens), torch.tensor([0, 7, 20])
    own = maps()
    found = model.ahead(text, layer, rows, own)
    for row, states in zip(rows.tolist(), found, strict=True):
        alone = model.read(tokens[: row + 1])
        torch.testing.assert_close(model.ahead(alone, layer, torch.tensor([row]), own)[0], states, rtol=1e-4, atol=1e-4)
    counting = FrozenModel(one_hot())  # the next token's embedding is a linear map of this one's
    text = counting.read(torch.arange(12))
    shift = torch.eye(D).roll(1, 0)
    ahead = counting.ahead(text, 0, torch.tensor([3]), (torch.stack([shift, shift @ shift]), torch.zeros(2, D)))
    torch.testing.assert_close(ahead[0], text.states[-1][4:6], rtol=1e-4, atol=1e-4)


def one_hot() -> LlamaForCausalLM:
    """Tokens embedded as one-hot vectors of equal size, among random layers."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:D] = torch.eye(D)
    return model


def test_regressions_are_least_squares() -> None:
    """Against numpy's way over the very rows; the ridge draws weights of noise towards zero."""
    model, many, k = FrozenModel(llama()), texts(8), 2
    moments = stages.gather(model, many, [1], k, lambda: None)
    assert moments.rows == 8 * 38
    for target in (1, model.depth):
        x, y = [], []
        for tokens in many:
            states = model.read(tokens).states
            x.append(units(states[1])[0][:-k])
            y.append(torch.cat([units(states[target])[0][i : len(tokens) - k + i] for i in (1, 2)], 1))
        inputs = torch.cat([torch.cat(x), torch.ones(moments.rows, 1)], 1).double()
        wanted = torch.linalg.lstsq(inputs, torch.cat(y).double()).solution
        weight, bias = moments.solve(1, target, ridge=0.0)
        torch.testing.assert_close(weight.flatten(0, 1).T.double(), wanted[:-1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(bias.flatten().double(), wanted[-1], rtol=1e-3, atol=1e-3)
        assert moments.solve(1, target, ridge=1.0)[0].norm() < 0.9 * weight.norm()
    with pytest.raises(ValueError, match="the texts are too short to look 50 tokens ahead"):
        stages.gather(model, many, [1], 50, lambda: None).solve(1, 1)


def test_gradients_reach_the_maps_alone() -> None:
    """Against differences of the loss, through the upper layers."""
    network = llama()
    model = FrozenModel(network)
    text, rows = model.read(texts(1)[0]), torch.tensor([2, 9, 30])
    weight, bias = (tensor.requires_grad_() for tensor in maps())
    divergence(model, text, 1, rows, (weight, bias)).backward()
    assert weight.grad is not None
    direction = torch.randn_like(weight)
    with torch.no_grad():
        up, down = (divergence(model, text, 1, rows, (weight + h * direction, bias)) for h in (1e-3, -1e-3))
    slope = float((weight.grad * direction).sum())
    assert float(up - down) / 2e-3 == pytest.approx(slope, rel=2e-2, abs=1e-3)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("layer", [1, 3])
def test_tuning_lowers_the_divergence(layer: int) -> None:
    model, many = FrozenModel(llama()), texts()
    losses: list[float] = []
    tuner = Tuner(model, layer, maps(), Tuning(60, rows=16, rate=1e-2), "x")
    tuner.run(many, None, lambda tuner: losses.append(tuner.loss))
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_an_interrupted_tuning_goes_on(tmp_path: Path) -> None:
    """The maps are those of a run that was not interrupted, to the bit."""
    model, many, tuning, file = FrozenModel(llama()), texts(), Tuning(8, rows=16), tmp_path / "training"
    start = maps()
    whole = Tuner(model, 1, start, tuning, "x")
    whole.run(many, None, lambda _: None)

    def interrupt(tuner: Tuner) -> None:
        if tuner.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tuner(model, 1, start, tuning, "x").run(many, file, interrupt)
    again = Tuner(model, 1, [torch.zeros_like(each) for each in start], tuning, "x")
    again.resume(file)
    assert again.step == 3
    again.run(many, file, lambda _: None)
    for mine, other in zip(again.maps, whole.maps, strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(ValueError, match="a training with other settings, texts or weights; remove it to begin anew"):
        Tuner(model, 1, start, tuning, "y").resume(file)
    with pytest.raises(ValueError, match="the header and the tensors of the training do not fit"):
        Tuner(model, 1, maps(3), tuning, "x").resume(file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a file of draft training, or damaged"):
        again.resume(file)


def test_time_ends_a_tuning() -> None:
    tuner = Tuner(FrozenModel(llama()), 1, maps(), Tuning(10_000, minutes=0.3 / 60, rows=8), "x")
    tuner.run(texts(), None, lambda _: None)
    assert 0 < tuner.step < 10_000
    assert tuner.seconds >= 0.3
    for bad in ({"steps": -1}, {"rows": 0}, {"rate": 0.0}, {"minutes": 0.0}):
        with pytest.raises(ValueError, match="steps must not be negative, the others must be positive"):
            Tuning(**{"steps": 1, **bad})  # type: ignore[arg-type]


def test_accuracy_counts_what_is_right() -> None:
    """Maps to the head at once whose guesses are known: +2 is always right and what the model says, +3 never."""
    model = FrozenModel(llama())
    with torch.no_grad():
        model._base.norm.weight.fill_(1)
        model._head.weight.zero_()[:D] = torch.eye(D)
    text = model.read(torch.arange(20))
    states = torch.eye(D)[(text.tokens + 1) % D]  # of row t: what names token t + 1
    text.states[-1][:] = states
    shift = torch.eye(D).roll(1, 0)
    counter = Counter(model, model.depth, (torch.stack([shift, shift @ shift @ shift]), torch.zeros(2, D)), upper=False)
    counter.add(text, torch.arange(0, 17, 2))
    first, second = counter.result()
    assert (first.offset, first.guesses, first.top, first.same) == (2, 9, (1.0, 1.0, 1.0), 1.0)
    assert (second.offset, second.top[0], second.same) == (3, 0.0, 0.0)


def test_texts_are_judged_from_a_row_on() -> None:
    model, tokens = FrozenModel(llama()), texts(1)[0]
    for first, guesses in ((0, 10), (10, 7), (38, 0), (40, 0)):  # every fourth of rows that two tokens and one follow
        counter = Counter(model, 1, maps())
        found = stages.judge([stages.Held(tokens, first)], model, {"a": counter}, 2, lambda: None)
        assert [each.guesses for each in found["a"]] == [guesses] * 2


def test_generated_texts_begin_as_given() -> None:
    model, given = llama(), texts(3, 40)
    found = stages.generated(model, given, lambda: None)
    assert [len(text) for text in found] == [40] * 3
    assert all(torch.equal(a[: stages.START], b[: stages.START]) for a, b in zip(found, given, strict=True))
    assert not torch.equal(found[0], given[0])


def test_answers_follow_their_prompts() -> None:
    model, prompts = llama(), [[1, 2, 3], [4] * 9]
    found = stages.answered(model, prompts, 12, lambda: None)
    for prompt, text in zip(prompts, found, strict=True):
        assert text.tolist() == prompt + generate(model, prompt, max_new_tokens=12).tokens


def test_the_commonest_tokens() -> None:
    given = [torch.tensor([7, 7, 5, 3]), torch.tensor([7, 3, 9])]
    assert stages.frequent(given, V, 2).tolist() == [3, 7]
    assert stages.frequent(given, V, 5).tolist() == [0, 3, 5, 7, 9]
    assert stages.frequent(given, V, 5).dtype == torch.int32
    assert stages.frequent(given, V, 0) is stages.frequent(given, V, V) is None


def test_models_that_are_refused() -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=1, sliding_window=8)
    with pytest.raises(ValueError, match=r"drafts cannot be trained for .*: some of its layers have windows"):
        FrozenModel(MistralForCausalLM(config))
    eager = llama()
    eager.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='sdpa', but the model has 'eager'"):
        FrozenModel(eager)


def test_no_rows_give_no_shares() -> None:
    model = FrozenModel(llama())
    moments = Moments([1], model.depth, model.width, 2)
    moments.add(model.read(torch.tensor([1, 2])).states)
    assert moments.rows == 0
    assert [each.guesses for each in Counter(model, 1, maps()).result()] == [0, 0]
