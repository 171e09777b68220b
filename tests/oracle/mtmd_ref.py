# SPDX-License-Identifier: MIT
"""mtmd_ref: soft tokens of an image as llama.cpp's mtmd computes them, from the same mmproj file."""
import ctypes

import numpy as np


def encode(text_gguf, mmproj, rgb):
    """Soft tokens [n, width] of an RGB image [H, W, 3], on the CPU. Give it at the tower's size: mtmd resizes without antialiasing."""
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
    pixels = np.ascontiguousarray(rgb)
    bitmap = mt.mtmd_bitmap_init(rgb.shape[1], rgb.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    text = mt.mtmd_input_text()
    text.text = mt.mtmd_get_marker(ctx)
    text.text_len, text.add_special, text.parse_special = len(text.text), True, True
    chunks = mt.mtmd_input_chunks_init()
    assert mt.mtmd_tokenize(ctx, chunks, ctypes.byref(text), (mt.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
    out = None
    for i in range(mt.mtmd_input_chunks_size(chunks)):
        chunk = mt.mtmd_input_chunks_get(chunks, i)
        if mt.mtmd_input_chunk_get_type(chunk) == 1:  # an image
            n = mt.mtmd_input_chunk_get_n_tokens(chunk)
            assert mt.mtmd_encode_chunk(ctx, chunk) == 0
            out = np.ctypeslib.as_array(mt.mtmd_get_output_embd(ctx), shape=(n, ll.llama_model_n_embd(model))).copy()
    mt.mtmd_input_chunks_free(chunks)
    mt.mtmd_bitmap_free(bitmap)
    mt.mtmd_free(ctx)
    ll.llama_model_free(model)
    return out
