"""Muon: the matrices of the blocks move as torch's own Muon moves them, the rest as AdamW moves it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, Muon, decay_groups, orthogonalize

CONFIG = GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16)


def _with_gradients(seed: int = 0) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    torch.manual_seed(seed + 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


def _steps(model: GPT, optimizer: torch.optim.Optimizer, n: int = 3) -> dict[str, torch.Tensor]:
    for step in range(n):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_a_matrix_moves_as_torchs_muon_moves_it(shape):
    moved = []
    for ours in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        settings = {"lr": 0.02, "weight_decay": 0.1}
        optimizer: torch.optim.Optimizer
        if ours:
            optimizer = Muon([("h.0.mlp.weight", p)], momentum=0.95, momentum_warmup_steps=0, **settings)
        else:
            optimizer = torch.optim.Muon([p], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
        for _ in range(4):
            p.grad = torch.randn(shape)
            optimizer.step()
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=0, atol=2e-3)  # bf16: 0.02 · 0.2 · √64 / 2⁸ a step


def test_query_key_and_value_are_orthogonalised_apart():
    model = _with_gradients()
    gradient = model.transformer.get_parameter("h.0.attn.c_attn.weight").grad.clone()
    before = model.transformer.get_parameter("h.0.attn.c_attn.weight").detach().clone()
    Muon(model.named_parameters(), lr=1.0, weight_decay=0.0).step()
    change = before - model.transformer.get_parameter("h.0.attn.c_attn.weight").detach()
    for part, of_gradient in zip(change.chunk(3), gradient.chunk(3), strict=True):
        alone = torch.nn.Parameter(torch.zeros(16, 16))
        alone.grad = of_gradient.clone()
        torch.optim.Muon([alone], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        torch.testing.assert_close(part, -alone.detach(), rtol=0, atol=0.02)  # bf16


def test_embeddings_biases_and_layernorms_move_as_adamw_moves_them():
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    ours, theirs = _with_gradients(), _with_gradients()
    groups = decay_groups(theirs.named_parameters())
    muon = _steps(ours, Muon(decay_groups(ours.named_parameters()), lr=3e-3, adamw_lr=1e-2, **settings))
    adamw = _steps(theirs, torch.optim.AdamW(groups, lr=1e-2, **settings))
    for name in muon:
        if ".h." not in name or muon[name].dim() < 2:
            torch.testing.assert_close(muon[name], adamw[name], rtol=1e-5, atol=1e-7)
        else:
            assert not torch.allclose(muon[name], adamw[name], rtol=1e-2)


def test_an_update_is_about_as_large_as_adamws():
    model = _with_gradients()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Muon(model.named_parameters(), lr=1.0, weight_decay=0.0).step()
    for name in ("h.0.attn.c_proj.weight", "h.1.mlp.c_fc.weight", "h.1.mlp.c_proj.weight"):
        change = model.transformer.get_parameter(name) - before[f"transformer.{name}"]
        assert 0.15 < change.detach().square().mean().sqrt().item() < 0.25, name


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 32, 96)).float())
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_each_matrix_of_a_stack_is_orthogonalised_alone():
    torch.manual_seed(0)
    stack = torch.randn(4, 16, 32)
    together, alone = orthogonalize(stack), torch.cat([orthogonalize(matrix[None]) for matrix in stack])
    torch.testing.assert_close(together.float(), alone.float(), rtol=0, atol=0.02)


def test_momentum_warms_up_from_085():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([("h.0.mlp.weight", p)], momentum=0.95, momentum_warmup_steps=4)
    buffer, expected = torch.zeros(4, 4), []
    for momentum in (0.875, 0.9, 0.925, 0.95, 0.95):
        p.grad = torch.randn(4, 4)
        buffer = momentum * buffer + (1 - momentum) * p.grad
        optimizer.step()
        expected.append((optimizer.state[p]["momentum_buffer"].clone(), buffer))
    for ours, literal in expected:
        torch.testing.assert_close(ours, literal)


def test_state_goes_through_a_file_and_comes_back_to_the_bit(tmp_path):
    whole, first, second = (_with_gradients() for _ in range(3))
    expected = _steps(whole, Muon(whole.named_parameters()), 3)
    optimizer = Muon(first.named_parameters())
    for step in range(2):
        torch.manual_seed(step)
        for p in first.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    torch.save([first.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(weights)
    resumed = Muon(second.named_parameters())
    resumed.load_state_dict(state)
    torch.manual_seed(2)
    for p in second.parameters():
        p.grad = torch.randn_like(p)
    resumed.step()
    for name, p in second.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_what_has_no_gradient_stays_as_it_is():
    model = _with_gradients()
    optimizer = Muon(model.named_parameters())
    optimizer.zero_grad()  # as a step whose loss was not finite leaves them
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_a_closure_sees_all_parameters():
    model = GPT(CONFIG)
    optimizer = Muon(model.named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def closure() -> float:
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        optimizer.zero_grad()  # as Lightning's does
        assert all(p.grad is None for p in model.parameters())
        return model(torch.zeros(1, 8, dtype=torch.long)).square().mean().backward() or 1.5

    assert optimizer.step(closure) == 1.5


def test_every_parameter_is_in_one_group_and_what_is_1d_does_not_decay():
    model = GPT(CONFIG)
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
def test_biases_and_layernorms_do_not_decay_and_all_else_does_at_any_shape(layers, heads, size, T, V, data):
    """By their names; also where a side of a matrix is 1 long. What wants no gradient is in no group."""
    model = GPT(GPTConfig(T, V, layers, heads, heads * size))
    names = [name for name, _ in model.named_parameters()]
    frozen = data.draw(st.sets(st.sampled_from(names), max_size=3))
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    decayed, spared = decay_groups(model.named_parameters())
    wanted = [name for name in names if name not in frozen]
    assert spared["param_names"] == [n for n in wanted if n.rsplit(".", 2)[-2].startswith("ln_") or n.endswith("bias")]
    assert decayed["param_names"] == [name for name in wanted if name not in spared["param_names"]]
    assert (spared["weight_decay"], decayed.get("weight_decay")) == (0.0, None)
    for group in (decayed, spared):
        assert all(p is model.get_parameter(n) for n, p in zip(group["param_names"], group["params"], strict=True))


def test_what_muon_cannot_take_is_refused():
    model = GPT(CONFIG)
    with pytest.raises(ValueError, match=r"by name: give model\.named_parameters\(\)"):
        Muon(model.parameters())
    with pytest.raises(ValueError, match="no matrix of a block"):
        Muon([("wte.weight", torch.nn.Parameter(torch.zeros(3, 3)))])
    for wrong in (-1e-3, float("nan")):  # below 0 it would climb the loss
        with pytest.raises(ValueError, match=f"adamw_lr={wrong}: give 0 or more"):
            Muon(model.named_parameters(), adamw_lr=wrong)


def test_adamw_knows_its_names():
    optimizer = AdamW(decay_groups(GPT(CONFIG).named_parameters()))
    assert "transformer.wte.weight" in optimizer.param_groups[0]["param_names"]
    assert "transformer.ln_f.bias" in optimizer.param_groups[1]["param_names"]
