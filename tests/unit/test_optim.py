"""Muon updates the matrices of the blocks as torch's Muon does, and everything else as AdamW does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, Muon, decay_groups, orthogonalize

CONFIG = GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)


def _model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def _train(model: GPT, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> dict[str, torch.Tensor]:
    """Steps on random gradients that depend only on the step's number; returns the weights."""
    for step in steps:
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_a_matrix_is_updated_as_by_torchs_muon(shape):
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95}
        optimizer: torch.optim.Optimizer
        if ours:
            optimizer = Muon([("h.0.mlp.weight", p)], momentum_warmup_steps=0, **options)
        else:
            optimizer = torch.optim.Muon([p], adjust_lr_fn="match_rms_adamw", **options)
        for _ in range(4):
            p.grad = torch.randn(shape)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=2e-3)  # bf16: 0.02 · 0.2 · √64 / 2⁸ per step


def test_query_key_and_value_are_orthogonalized_separately():
    model = _model()
    weight = model.transformer.get_parameter("h.0.attn.c_attn.weight")
    before = weight.detach().clone()
    _train(model, Muon(model.named_parameters(), lr=1.0, weight_decay=0.0), range(1))
    for change, gradient in zip((before - weight.detach()).chunk(3), weight.grad.chunk(3), strict=True):
        alone = torch.nn.Parameter(torch.zeros(16, 16))
        alone.grad = gradient.clone()
        torch.optim.Muon([alone], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        torch.testing.assert_close(change, -alone.detach(), rtol=0, atol=0.02)  # bf16


def test_embeddings_biases_and_layernorms_are_updated_as_by_torchs_adamw():
    options = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = _model(), _model()
    muon = _train(ours, Muon(decay_groups(ours.named_parameters()), lr=3e-3, adamw_lr=1e-2, **options))
    adamw = _train(theirs, torch.optim.AdamW(decay_groups(theirs.named_parameters()), lr=1e-2, **options))
    for name in muon:
        if ".h." not in name or muon[name].dim() < 2:
            torch.testing.assert_close(muon[name], adamw[name], rtol=1e-5, atol=1e-7)
        else:
            assert not torch.allclose(muon[name], adamw[name], rtol=1e-2)


def test_orthogonalize_brings_the_singular_values_of_each_matrix_near_one():
    torch.manual_seed(0)
    matrices = torch.randn(3, 32, 96)
    together = orthogonalize(matrices).float()
    values = torch.linalg.svdvals(together)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices]).float()
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=0.02)


def test_momentum_warms_up_from_085():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([("h.0.mlp.weight", p)], momentum=0.95, momentum_warmup_steps=4)
    expected = torch.zeros(4, 4)
    for momentum in (0.875, 0.9, 0.925, 0.95, 0.95):
        p.grad = torch.randn(4, 4)
        expected = momentum * expected + (1 - momentum) * p.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], expected)


def test_training_resumed_from_a_file_is_bit_identical(tmp_path):
    uninterrupted, first, second = _model(), _model(), GPT(CONFIG)
    expected = _train(uninterrupted, Muon(uninterrupted.named_parameters()))
    optimizer = Muon(first.named_parameters())
    _train(first, optimizer, range(2))
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(weights)
    resumed = Muon(second.named_parameters())
    resumed.load_state_dict(state)
    for name, p in _train(second, resumed, range(2, 3)).items():
        assert torch.equal(p, expected[name]), name


def test_parameters_without_a_gradient_are_left_alone():
    model = _model()
    optimizer = Muon(model.named_parameters())  # no gradients: as after a step whose loss was not finite
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_the_closure_sees_the_groups_of_all_parameters():
    model = _model()
    optimizer = Muon(model.named_parameters())

    def closure() -> float:
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        model(torch.zeros(1, 8, dtype=torch.long)).square().mean().backward()  # gradients are enabled
        return 1.5

    assert optimizer.step(closure) == 1.5


def test_muon_puts_each_parameter_into_one_group_with_its_settings():
    model = _model()
    optimizer = Muon(model.named_parameters(), lr=1e-3, adamw_lr=2e-3, weight_decay=0.1)
    grouped = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(grouped)
    for name, p in model.named_parameters():
        in_a_block = ".h." in name and p.dim() == 2
        assert grouped[name]["orthogonal"] == in_a_block, name
        assert grouped[name]["lr"] == (1e-3 if in_a_block else 2e-3), name
        assert grouped[name]["weight_decay"] == (0.1 if p.dim() == 2 else 0.0), name


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_all_weights_decay_but_biases_and_layernorms_at_any_shape(layers, heads, size, T, V, data):
    """Also where a side of a matrix is 1 long. Frozen parameters are in no group."""
    model = GPT(GPTConfig(T, V, layers, heads, heads * size))
    names = [name for name, _ in model.named_parameters()]
    frozen = data.draw(st.sets(st.sampled_from(names), max_size=3))
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    decay, no_decay = decay_groups(model.named_parameters())
    trained = [name for name in names if name not in frozen]
    assert no_decay["param_names"] == [n for n in trained if ".ln_" in n or n.endswith("bias")]
    assert decay["param_names"] == [name for name in trained if name not in no_decay["param_names"]]
    assert (no_decay["weight_decay"], decay.get("weight_decay")) == (0.0, None)
    for group in (decay, no_decay):
        assert all(p is model.get_parameter(n) for n, p in zip(group["param_names"], group["params"], strict=True))


def test_parameters_that_muon_cannot_take_are_refused():
    model = _model()
    with pytest.raises(ValueError, match=r"by name: give it model\.named_parameters\(\)"):
        Muon(model.parameters())
    with pytest.raises(ValueError, match="no matrix of a block"):
        Muon([("wte.weight", torch.nn.Parameter(torch.zeros(3, 3)))])
    with pytest.raises(ValueError, match=r"momentum=1\.0"):  # would ignore all gradients
        Muon(model.named_parameters(), momentum=1.0)


def test_adamw_is_fused_and_keeps_the_names_of_its_parameters():
    optimizer = AdamW(decay_groups(_model().named_parameters()))
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert "transformer.wte.weight" in optimizer.param_groups[0]["param_names"]
    assert "transformer.ln_f.bias" in optimizer.param_groups[1]["param_names"]
