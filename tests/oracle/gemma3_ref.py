# SPDX-License-Identifier: MIT
"""gemma3_ref: any gemma3 GGUF as a transformers model in fp32, plus its tokenizer; the oracle of keel.

Owns the mapping GGUF names -> transformers names and the config derived from GGUF metadata.
Does not own test cases. Checked against llama.cpp by `python gemma3_ref.py MODEL.gguf`.
Sources: transformers Gemma3ForCausalLM; llama.cpp src/models/gemma3*.cpp for layer pattern and rope.
"""
import functools
import heapq
import sys

import gguf
import numpy as np
import torch

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

torch.set_grad_enabled(True)

# GGUF block tensor -> transformers module; norms are stored as 1 + w in GGUF.
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TARGETS = list(LINEARS)
HF_OF = {k: v.split(".")[1] for k, v in LINEARS.items()}
PATTERN = 6  # layers i with i % 6 == 5 attend globally (llama.cpp set_swa_pattern(6), transformers default)


def metadata(reader):
    """GGUF key-value pairs as Python values; long arrays included."""
    out = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            out[name] = field.contents()
    return out


def config_of(meta, tensors):
    g = lambda k, d=None: meta.get("gemma3." + k, d)
    hidden, heads, layers = g("embedding_length"), g("attention.head_count"), g("block_count")
    head_dim = g("attention.key_length", hidden // heads)
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": g("rope.freq_base_swa", 10000.0)},
            "full_attention": {"rope_type": "default", "rope_theta": g("rope.freq_base", 1e6)}}
    if g("rope.scaling.type", "none") == "linear":
        rope["full_attention"].update(rope_type="linear", factor=float(g("rope.scaling.factor")))
    # The 27B is the only size whose query scale is not head_dim: 5376 / 32.
    qscale = hidden // heads if layers == 62 else head_dim
    return Gemma3TextConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=hidden,
        intermediate_size=g("feed_forward_length"), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=g("attention.head_count_kv", heads), head_dim=head_dim,
        query_pre_attn_scalar=qscale, rms_norm_eps=float(np.float32(g("attention.layer_norm_rms_epsilon"))),
        sliding_window=g("attention.sliding_window"), max_position_embeddings=g("context_length"),
        layer_types=["full_attention" if i % PATTERN == PATTERN - 1 else "sliding_attention"
                     for i in range(layers)],
        rope_parameters=rope, tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id", 2),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id", 1),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id", 0), attn_implementation="eager")


def dequant(t):
    """One GGUF tensor as fp32 numpy, in numpy order ([out, in])."""
    w = np.ascontiguousarray(gguf.quants.dequantize(t.data, t.tensor_type), dtype=np.float32)
    return w if w.flags.writeable else w.copy()  # F32 tensors are views of the read-only file map


def hf_state(tensors, layers):
    sd = {"model.embed_tokens.weight": dequant(tensors["token_embd.weight"]),
          "model.norm.weight": dequant(tensors["output_norm.weight"]) - 1}
    sd["lm_head.weight"] = (dequant(tensors["output.weight"]) if "output.weight" in tensors
                            else sd["model.embed_tokens.weight"])
    for i in range(layers):
        for src, dst in LINEARS.items():
            sd[f"model.layers.{i}.{dst}.weight"] = dequant(tensors[f"blk.{i}.{src}.weight"])
        for src, dst in NORMS.items():
            sd[f"model.layers.{i}.{dst}.weight"] = dequant(tensors[f"blk.{i}.{src}.weight"]) - 1
    return {k: torch.from_numpy(v) for k, v in sd.items()}


class Spm:
    """Gemma's SentencePiece BPE, straight from its definition: user-defined pieces are cut out first (longest
    piece first), then the adjacent pair with the best score merges (leftmost on ties), then bytes."""

    def __init__(self, meta):
        self.tokens = meta["tokenizer.ggml.tokens"]
        self.scores = meta["tokenizer.ggml.scores"]
        self.types = meta["tokenizer.ggml.token_type"]
        self.bos = meta.get("tokenizer.ggml.bos_token_id", 2)
        self.eos = meta.get("tokenizer.ggml.eos_token_id", 1)
        self.unk = meta.get("tokenizer.ggml.unknown_token_id", 3)
        self.id = {t: i for i, t in enumerate(self.tokens)}
        self.user = sorted((i for i, t in enumerate(self.types) if t == 4), key=lambda i: -len(self.tokens[i]))
        self.control = sorted((i for i, t in enumerate(self.types) if t in (3, 4)),
                              key=lambda i: -len(self.tokens[i].encode()))
        self.eot = self.id.get("<end_of_turn>")

    def _cut(self, text, ids):
        parts = [text]
        for i in ids:
            piece, new = self.tokens[i], []
            if piece not in text:
                continue
            for p in parts:
                if not isinstance(p, str):
                    new.append(p)
                    continue
                bits = p.split(piece)
                for k, b in enumerate(bits):
                    if k:
                        new.append(i)
                    if b:
                        new.append(b)
            parts = new
        return parts

    def _bpe(self, text):
        sym = list(text.replace(" ", "\u2581"))
        nxt, prv = list(range(1, len(sym))) + [-1], list(range(-1, len(sym) - 1))
        heap = []

        def push(a, b):
            if a >= 0 and b >= 0:
                i = self.id.get(sym[a] + sym[b])
                if i is not None:
                    heapq.heappush(heap, (-self.scores[i], a, b, sym[a], sym[b]))

        for k in range(len(sym) - 1):
            push(k, k + 1)
        while heap:
            _, a, b, sa, sb = heapq.heappop(heap)
            if sym[a] != sa or sym[b] != sb or nxt[a] != b:
                continue
            sym[a], sym[b] = sa + sb, None
            nxt[a] = nxt[b]
            if nxt[b] >= 0:
                prv[nxt[b]] = a
            push(prv[a], a)
            push(a, nxt[a])
        out = []
        for s in sym:
            if s is None:
                continue
            if s in self.id:
                out.append(self.id[s])
            else:
                out += [self.id.get(f"<0x{c:02X}>", self.unk) for c in s.encode()]
        return out

    def encode(self, text, bos=True, special=False):
        out = [self.bos] if bos else []
        for p in self._cut(text, self.control if special else self.user):
            out += [p] if isinstance(p, int) else self._bpe(p)
        return out


class Ref:
    """A loaded model: .model (transformers, fp32, eager, frozen), .tok (Spm), .meta, .config."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.path, self.meta = path, metadata(reader)
        tensors = {t.name: t for t in reader.tensors}
        self.config = config_of(self.meta, tensors)
        with torch.device("meta"):
            self.model = Gemma3ForCausalLM(self.config)
        sd = hf_state(tensors, self.config.num_hidden_layers)
        self.model.to_empty(device="cpu")
        missing, unexpected = self.model.load_state_dict(sd, strict=False)
        assert not missing and not unexpected, (missing, unexpected)
        self.model.tie_weights()
        self._restore_buffers()
        self.model.requires_grad_(False).eval()
        self.tok = Spm(self.meta)

    def _restore_buffers(self):
        # to_empty() left the non-persistent buffers undefined: rotary frequencies and the embedding scale.
        inner = self.model.model
        inner.rotary_emb = type(inner.rotary_emb)(self.config)
        inner.embed_tokens.embed_scale = torch.tensor(self.config.hidden_size ** 0.5)

    @torch.no_grad()
    def logits(self, ids, model=None):
        return (model or self.model)(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def logprobs(self, ids, model=None):
        """log p(ids[i] | ids[:i]) for i = 1 .. n-1."""
        lp = torch.log_softmax(self.logits(ids, model)[:-1].double(), -1)
        return lp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def greedy(self, ids, n, stop=()):
        out = list(ids)
        for _ in range(n):
            out.append(int(self.logits(out)[-1].argmax()))
            if out[-1] in stop:
                break
        return out[len(ids):]

    def perplexity(self, text, ctx):
        """Non-overlapping windows of ctx tokens, each starting with BOS (so ctx - 1 text tokens a window);
        a last shorter window counts too. Returns (ppl, mean nll, tokens)."""
        ids, nll, n = self.tok.encode(text, bos=False), 0.0, 0
        for a in range(0, len(ids), ctx - 1):
            lp = self.logprobs([self.tok.bos] + ids[a:a + ctx - 1])
            nll, n = nll - sum(lp), n + len(lp)
        return float(np.exp(nll / n)), nll / n, n


@functools.lru_cache(maxsize=8)
def load(path):
    return Ref(str(path))


def main():
    from llama_cpp import Llama
    path = sys.argv[1]
    ref = load(path)
    text = ("The lighthouse keeper wrote in his log that the fog had come early this year. "
            "At noon he counted 17 ships, and at night only 3 lights could be seen from the tower.")
    ids = ref.tok.encode(text)
    ll = Llama(path, n_ctx=1024, logits_all=True, verbose=False, n_gpu_layers=0)
    assert ll.tokenize(text.encode(), add_bos=True, special=False) == ids, "tokenizers differ"
    ll.eval(ids)
    a = torch.log_softmax(ref.logits(ids).double(), -1)
    b = torch.log_softmax(torch.from_numpy(np.array(ll.scores[:len(ids)])).double(), -1)
    pick = lambda m: m[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    d = (pick(a) - pick(b)).abs()
    print(f"tokens {len(ids)}  mean logprob {pick(a).mean():.4f} (llama.cpp {pick(b).mean():.4f})  "
          f"mean |d| {d.mean():.4f}  max |d| {d.max():.4f}  top-1 agree {(a.argmax(1) == b.argmax(1)).float().mean():.3f}")


if __name__ == "__main__":
    main()
