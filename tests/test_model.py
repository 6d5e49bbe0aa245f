"""NewGPT against transformers' Llama, and the identities that ablation and the gauge argument rest on."""

import importlib
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import janus_adaptive as janus

SIZES = dict(vocab_size=97, n_layers=3, d_model=48, n_heads=6, d_head=8, d_ff=80, seq_len=40)


def model(n_kv_heads: int = 6, tied: bool = True, **more) -> janus.NewGPT:
    """A small random model whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(0)
    net = janus.NewGPT(janus.GPTConfig(**SIZES, n_kv_heads=n_kv_heads, tied=tied, **more)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.dim() == 1 else 0.0))
    return net


def tokens(n: int = 3) -> torch.Tensor:
    return torch.randint(
        SIZES["vocab_size"], (n, SIZES["seq_len"]), generator=torch.Generator().manual_seed(1)
    )


def as_llama(net: janus.NewGPT) -> LlamaForCausalLM:
    """The same weights in transformers' implementation."""
    c = net.cfg
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.d_head,
            max_position_embeddings=c.seq_len,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied,
            attention_bias=False,
        )
    ).eval()
    state = {
        "model.embed_tokens.weight": net.embedding.weight,
        "model.norm.weight": net.norm.weight,
        "lm_head.weight": net.unembedding.weight,
    }
    for l, b in enumerate(net.blocks):
        q, k, v = b.attn.w_qkv.weight.split(
            [c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_head]
        )
        gate, up = b.w_gate_up.weight.chunk(2)
        names = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": b.attn.w_o.weight,
        }
        names |= {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": b.w_down.weight}
        names |= {
            "input_layernorm": b.norm_attn.weight,
            "post_attention_layernorm": b.norm_mlp.weight,
        }
        state |= {f"model.layers.{l}.{name}.weight": w for name, w in names.items()}
    llama.load_state_dict(state, strict=True)
    return llama


@pytest.mark.parametrize("n_kv_heads", [6, 2, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [{}, {"rope_theta": 500.0, "norm_eps": 1e-3}])
def test_logits_and_loss_equal_transformers_llama(n_kv_heads, tied, more):
    net, x = model(n_kv_heads, tied, **more), tokens()
    with torch.no_grad():
        logits, loss = net(x[:, :-1], x[:, 1:])
        theirs = as_llama(net)(x[:, :-1]).logits
    assert theirs.std() > 0.3  # otherwise the comparison would mean little
    assert (logits - theirs).abs().max() < 1e-4
    assert math.isclose(
        loss.item(),
        torch.nn.functional.cross_entropy(theirs.flatten(0, 1), x[:, 1:].flatten()).item(),
        abs_tol=1e-5,
    )


@pytest.mark.parametrize(
    "script", ["harvest_activations", "train_sae", "ablation_test", "hero_head_analysis"]
)
def test_every_pasted_model_gives_identical_logits(script):
    other, net, x = importlib.import_module(script), model(2), tokens()
    twin = other.NewGPT(other.GPTConfig(**vars(net.cfg))).eval()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x)[0], net(x)[0])


def test_causality():
    net, x = model(), tokens()
    y = x.clone()
    y[:, 25] = (y[:, 25] + 1) % SIZES["vocab_size"]
    with torch.no_grad():
        a, b = net(x)[0], net(y)[0]
    assert torch.equal(a[:, :25], b[:, :25])
    assert (a[:, 25:] - b[:, 25:]).abs().amax(
        (0, 2)
    ).min() > 1e-4  # and every later position does see the change


def test_head_scale_zero_equals_zero_rows_of_the_output_projection():
    net, x = model(), tokens()
    for l, h in [(0, 0), (1, 5), (2, 3)]:
        scale = torch.ones(3, 6)
        scale[l, h] = 0
        edited = model()
        with torch.no_grad():
            edited.blocks[l].attn.w_o.weight[:, h * 8 : (h + 1) * 8] = 0
            a, b = net(x, head_scale=scale)[0], edited(x)[0]
        assert (a - b).abs().max() < 1e-5
        assert (a - net(x)[0]).abs().max() > 1e-3
    assert torch.equal(net(x, head_scale=torch.ones(3, 6))[0], net(x)[0])


def test_tapped_activations_satisfy_their_definitions():
    net, x = model(2), tokens()
    sites = ("resid_pre", "z", "pattern", "attn_out", "resid_mid", "mlp_out", "resid_post")
    tap = dict.fromkeys(f"{s}.{l}" for s in sites for l in range(3))
    with torch.no_grad():
        logits = net(x, tap=tap)[0]
        llama = as_llama(net)
        llama.set_attn_implementation("eager")
        theirs = llama(x, output_attentions=True, output_hidden_states=True)
        for l, block in enumerate(net.blocks):
            t = {s: tap[f"{s}.{l}"] for s in sites}
            assert (t["pattern"] - theirs.attentions[l]).abs().max() < 1e-5
            assert (t["resid_pre"] - theirs.hidden_states[l]).abs().max() < 1e-4
            cos, sin = net.rotary(l, x.shape[1])
            _, _, v = block.attn.qkv(block.norm_attn(t["resid_pre"]), cos, sin)
            assert (t["z"] - (t["pattern"] @ v).transpose(1, 2)).abs().max() < 1e-5
            per_head = [
                t["z"][:, :, h] @ block.attn.w_o.weight[:, h * 8 : (h + 1) * 8].T for h in range(6)
            ]
            assert (sum(per_head) - t["attn_out"]).abs().max() < 1e-4
            assert torch.allclose(
                t["resid_pre"] + t["attn_out"] + t["mlp_out"], t["resid_post"], atol=1e-5
            )
        assert torch.equal(net.unembed(net.run_blocks(tap["resid_post.0"], start=1)), logits)


def test_parameter_counts_of_the_full_preset():
    p = janus.PRESETS["full"]
    with torch.device("meta"):
        net = janus.NewGPT(
            janus.GPTConfig(
                50257,
                p["n_layers"],
                p["d_model"],
                p["n_heads"],
                p["n_heads"],
                64,
                p["d_ff"],
                p["seq_len"],
            )
        )
    llama = 12 * (4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768) + 768
    assert net.n_params() == (llama + 50257 * 768, llama)
    assert llama == 84_953_856  # "84.9M": without embeddings


def rotate_value_bases(net: janus.NewGPT, seed: int = 0) -> None:
    """Rotates the basis in which each head writes its values, and undoes it in the output projection."""
    k, h = net.cfg.d_head, net.cfg.n_heads
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in net.blocks:
            for i in range(h):
                r = torch.linalg.qr(torch.randn(k, k, generator=g))[0]
                rows = slice((2 * h + i) * k, (2 * h + i + 1) * k)
                b.attn.w_qkv.weight[rows] = r @ b.attn.w_qkv.weight[rows]
                b.attn.w_o.weight[:, i * k : (i + 1) * k] = (
                    b.attn.w_o.weight[:, i * k : (i + 1) * k] @ r.T
                )


def test_gauge_rotating_value_bases_moves_sigma_z_only(smoke_checkpoint):
    net, ckpt = janus.load_checkpoint(smoke_checkpoint, torch.device("cpu"), skip_probe=False)
    x = torch.randint(
        net.cfg.vocab_size, (8, net.cfg.seq_len), generator=torch.Generator().manual_seed(3)
    )

    def look():
        tap = dict.fromkeys(f"z.{l}" for l in range(net.cfg.n_layers))
        with torch.no_grad():
            logits = net(x, tap=tap)[0]
        z = janus.sigma_of(torch.stack([janus.head_gram(t) for t in tap.values()]))
        o = janus.sigma_of(
            torch.stack(
                [
                    janus.head_gram(t, b.attn.w_o.weight)
                    for t, b in zip(tap.values(), net.blocks, strict=True)
                ]
            )
        )
        return logits, z, o

    logits, sigma_z, sigma_resid = look()
    rotate_value_bases(net)
    logits2, sigma_z2, sigma_resid2 = look()
    assert (logits - logits2).abs().max() < 1e-4
    assert torch.allclose(sigma_resid, sigma_resid2, rtol=1e-3)
    assert ((sigma_z2 - sigma_z).abs() / sigma_z).max() > 0.2


def test_head_gram_against_numpy():
    g = torch.Generator().manual_seed(2)
    z, w_o = torch.randn(2, 7, 4, 5, generator=g), torch.randn(9, 20, generator=g)
    heads = z.permute(2, 0, 1, 3).reshape(4, -1).numpy()
    assert np.allclose(janus.head_gram(z), heads @ heads.T, atol=1e-4)
    written = [(z[:, :, h] @ w_o[:, 5 * h : 5 * h + 5].T).flatten().numpy() for h in range(4)]
    assert np.allclose(janus.head_gram(z, w_o), np.array(written) @ np.array(written).T, atol=1e-3)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    cos = [
        heads[i] @ heads[j] / np.linalg.norm(heads[i]) / np.linalg.norm(heads[j]) for i, j in pairs
    ]
    gram = janus.head_gram(z)[None]
    assert np.allclose(janus.head_cosines(gram)[0], cos, atol=1e-6)
    assert np.isclose(janus.sigma_of(gram)[0], np.abs(cos).mean())
    assert np.isclose(janus.decorrelation_penalty(gram, "cos2")[0], np.square(cos).mean())
    assert np.isclose(
        janus.decorrelation_penalty(gram, "fro")[0], np.sqrt(2 * np.square(cos).sum())
    )


def test_sigma_does_not_depend_on_the_micro_batch():
    z = torch.randn(32, 10, 4, 8, generator=torch.Generator().manual_seed(0))
    whole = janus.sigma_of(janus.head_gram(z)[None])
    parts = [janus.head_gram(part) for part in z.split(8)]
    assert torch.allclose(janus.sigma_of(sum(parts)[None]), whole, atol=1e-6)
    mean_of_parts = torch.stack([janus.sigma_of(p[None]) for p in parts]).mean()
    assert (mean_of_parts - whole).abs() > 1e-3  # the tempting wrong way is biased upwards


@pytest.mark.parametrize("t", [64, 512])
def test_sigma_of_independent_heads_is_the_sampling_floor(t):
    """Heads with independent isotropic outputs, n = T d numbers each: E|cos| = Gamma(n/2) / (sqrt(pi) Gamma((n+1)/2))."""
    n, g = t * 16, torch.Generator().manual_seed(0)
    grams = torch.stack(
        [janus.head_gram(torch.randn(1, t, 12, 16, generator=g)) for _ in range(20)]
    )
    expected = math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)
    assert math.isclose(janus.sigma_of(grams).mean().item(), expected, rel_tol=0.05)


def test_penalty_gradient_against_finite_differences():
    z = torch.randn(2, 3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("cos2", "abs", "fro"):

        def penalty(v, kind=kind):  # in float64: head_gram itself rounds to float32
            flat = v.permute(2, 0, 1, 3).flatten(1)
            return janus.decorrelation_penalty((flat @ flat.T)[None], kind)[0]

        assert torch.autograd.gradcheck(penalty, z.clone().requires_grad_())


@pytest.mark.parametrize("length", [1, 3, 17, 32])
def test_attention_by_rows_is_scaled_dot_product_attention(length):
    """What the compiled model uses on a CPU, and its gradients, in float64."""
    q, k, v, g = torch.randn(
        4, 2, 3, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    leaves, found = [t.clone().requires_grad_() for t in (q, k, v)], []
    for attend in (
        janus.Attention.attention_by_rows,
        lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True),
    ):
        z = attend(*leaves)
        found.append((z, *torch.autograd.grad(z, leaves, g)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=1e-6
        )  # the softmax of ours is in float32
