# SPDX-License-Identifier: MIT
"""mtmd_ref: soft tokens of an image, and log-probabilities after a prompt with images, as llama.cpp's mtmd computes them from the same
GGUF files."""
import ctypes

import numpy as np


def load(text_gguf, mmproj):
    """(model, mtmd context) on the CPU."""
    import llama_cpp as ll
    import llama_cpp.mtmd_cpp as mt
    params = ll.llama_model_default_params()
    params.n_gpu_layers = 0
    model = ll.llama_model_load_from_file(str(text_gguf).encode(), params)
    options = mt.mtmd_context_params_default()
    options.use_gpu, options.n_threads, options.warmup, options.print_timings = False, 1, False, False
    options.flash_attn_type = 0  # off: it would round keys and values to halves
    ctx = mt.mtmd_init_from_file(str(mmproj).encode(), model, options)
    assert ctx, "mtmd refuses the mmproj file"
    return model, ctx


def tokenize(ctx, text, rgbs):
    """(chunks, bitmaps) of a text in which llama.cpp's marker stands for each image; pixels are copied."""
    import llama_cpp.mtmd_cpp as mt
    bitmaps = []
    for rgb in rgbs:
        pixels = np.ascontiguousarray(rgb)
        bitmaps.append(mt.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))))
    given = mt.mtmd_input_text()
    given.text = text
    given.text_len, given.add_special, given.parse_special = len(text), True, True
    chunks = mt.mtmd_input_chunks_init()
    assert mt.mtmd_tokenize(ctx, chunks, ctypes.byref(given), (mt.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps), len(bitmaps)) == 0
    return chunks, bitmaps


def logprobs(text_gguf, mmproj, rgbs, prompt, ids):
    """(n, log p of each of `ids` after a prompt of n tokens); "<image>" in the prompt stands for an image, with the newlines around it
    that Gemma3Processor writes and mtmd leaves to its caller. Keys and values in fp32."""
    import llama_cpp as ll
    import llama_cpp.mtmd_cpp as mt
    model, mtmd = load(text_gguf, mmproj)
    params = ll.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads, params.n_threads_batch = 512, 512, 512, 1, 1
    params.type_k = params.type_v = 0  # f32
    params.flash_attn_type = 0
    ctx = ll.llama_init_from_model(model, params)
    text = prompt.encode().replace(b"<image>", b"\n\n" + mt.mtmd_get_marker(mtmd) + b"\n\n")
    chunks, bitmaps = tokenize(mtmd, text, rgbs)
    past = ll.llama_pos(0)
    assert mt.mtmd_helper_eval_chunks(mtmd, ctx, chunks, 0, 0, 512, True, ctypes.byref(past)) == 0
    n, out, vocab = past.value, [], ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    for i in ids:
        z = np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, -1), shape=(vocab,)).astype(np.float64)
        out.append(float(z[i] - z.max() - np.log(np.exp(z - z.max()).sum())))
        assert ll.llama_decode(ctx, ll.llama_batch_get_one((ll.llama_token * 1)(i), 1)) == 0
    mt.mtmd_input_chunks_free(chunks)
    for b in bitmaps:
        mt.mtmd_bitmap_free(b)
    ll.llama_free(ctx)
    mt.mtmd_free(mtmd)
    ll.llama_model_free(model)
    return n, out


def encode(text_gguf, mmproj, rgb):
    """Soft tokens [n, width] of an RGB image [H, W, 3]. Give it at the tower's size: mtmd resizes without antialiasing."""
    import llama_cpp as ll
    import llama_cpp.mtmd_cpp as mt
    model, ctx = load(text_gguf, mmproj)
    chunks, bitmaps = tokenize(ctx, mt.mtmd_get_marker(ctx), [rgb])
    out = None
    for i in range(mt.mtmd_input_chunks_size(chunks)):
        chunk = mt.mtmd_input_chunks_get(chunks, i)
        if mt.mtmd_input_chunk_get_type(chunk) == 1:  # an image
            n = mt.mtmd_input_chunk_get_n_tokens(chunk)
            assert mt.mtmd_encode_chunk(ctx, chunk) == 0
            out = np.ctypeslib.as_array(mt.mtmd_get_output_embd(ctx), shape=(n, ll.llama_model_n_embd(model))).copy()
    mt.mtmd_input_chunks_free(chunks)
    mt.mtmd_bitmap_free(bitmaps[0])
    mt.mtmd_free(ctx)
    ll.llama_model_free(model)
    return out
