// SPDX-License-Identifier: MIT
// ops/tile.c: packs GGUF rows into the tile layout that shaders/common/quant.glsl reads, and uploads matrices.
// Source of the block layouts: ggml-common.h and ggml-quants.c of llama.cpp.
#include "ops.h"
#include "platform.h"

#include <stdlib.h>
#include <string.h>

#define TILE 64u // rows

// Words (u32) of the sections of one tile, for kb blocks of 32 columns.
struct sections {
    uint64_t q, h, s, d;
};

static struct sections sections_of(enum keel_dtype type, uint64_t kb)
{
    const uint64_t sb = kb / 8;
    switch (type) {
    case KEEL_F32:
        return (struct sections){ .q = kb * 2048 };
    case KEEL_F16:
    case KEEL_BF16:
        return (struct sections){ .q = kb * 1024 };
    case KEEL_Q4_0:
        return (struct sections){ .q = kb * 256, .s = kb * 32 };
    case KEEL_Q4_1:
        return (struct sections){ .q = kb * 256, .s = kb * 64 };
    case KEEL_Q5_0:
        return (struct sections){ .q = kb * 256, .h = kb * 64, .s = kb * 32 };
    case KEEL_Q5_1:
        return (struct sections){ .q = kb * 256, .h = kb * 64, .s = kb * 64 };
    case KEEL_Q8_0:
        return (struct sections){ .q = kb * 512, .s = kb * 32 };
    case KEEL_Q4_K:
        return (struct sections){ .q = kb * 256, .s = sb * 256, .d = sb * 64 };
    case KEEL_Q5_K:
        return (struct sections){ .q = kb * 256, .h = kb * 64, .s = sb * 256, .d = sb * 64 };
    case KEEL_Q6_K:
        return (struct sections){ .q = kb * 256, .h = kb * 128, .s = sb * 256, .d = sb * 32 };
    }
    return (struct sections){ 0 };
}

static uint64_t tile_bytes(enum keel_dtype type, uint64_t cols)
{
    const struct sections n = sections_of(type, (cols + 31) / 32);
    return 4 * (n.q + n.h + n.s + n.d);
}

uint64_t keel_tile_bytes(enum keel_dtype type, uint64_t rows, uint64_t cols)
{
    return keel_align_up(tile_bytes(type, cols) * ((rows + TILE - 1) / TILE), 256);
}

uint64_t keel_matrix_bytes(enum keel_dtype type, uint64_t rows, uint64_t cols)
{
    return keel_tile_bytes(type, rows, cols); // shards are whole tiles; rounding each to 256 bytes adds next to nothing
}

static uint16_t u16_at(const uint8_t *p)
{
    return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t u32_at(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

// Four words of 4-bit values in column order, from 16 bytes in GGML's order: low nibbles are columns 0-15, high ones 16-31.
static void pack_nibbles(uint32_t out[4], const uint8_t *qs)
{
    for (uint32_t j = 0; j < 4; j++) {
        const uint8_t *p = qs + (j & 1) * 8;
        uint32_t w = 0;
        for (uint32_t i = 0; i < 8; i++) {
            w |= (uint32_t)(j < 2 ? p[i] & 15 : p[i] >> 4) << (4 * i);
        }
        out[j] = w;
    }
}

// The same from 32 bytes of which all low (which = 0) or all high nibbles are the 32 columns, as K-quants have it.
static void pack_nibbles_k(uint32_t out[4], const uint8_t *qs, uint32_t which)
{
    for (uint32_t j = 0; j < 4; j++) {
        uint32_t w = 0;
        for (uint32_t i = 0; i < 8; i++) {
            w |= (uint32_t)(qs[8 * j + i] >> (4 * which) & 15) << (4 * i);
        }
        out[j] = w;
    }
}

// Scale and minimum i (0-7) of a Q4_K or Q5_K block, each 6 bits, from its 12 packed bytes.
static uint32_t scale_min_k(const uint8_t *s, uint32_t i)
{
    const uint32_t sc = i < 4 ? s[i] & 63u : (s[i + 4] & 15u) | (uint32_t)(s[i - 4] >> 6) << 4;
    const uint32_t mn = i < 4 ? s[i + 4] & 63u : (uint32_t)(s[i + 4] >> 4) | (uint32_t)(s[i] >> 6) << 4;
    return sc | mn << 8;
}

struct tile_out {
    uint32_t *q, *h, *s, *d;
};

static void set_half(uint32_t *word, uint32_t which, uint16_t value)
{
    *word |= (uint32_t)value << (16 * which);
}

static void pack_float_row(struct tile_out o, enum keel_dtype type, const uint8_t *src, uint64_t cols, uint32_t r)
{
    const uint32_t per_quad = type == KEEL_F32 ? 4 : 8, bytes = type == KEEL_F32 ? 4 : 2;
    for (uint64_t c = 0; c < cols; c += per_quad) {
        const uint64_t n = KEEL_MIN((uint64_t)per_quad, cols - c);
        memcpy(o.q + (c / per_quad * TILE + r) * 4, src + c * bytes, n * bytes); // little-endian hosts only
    }
}

static void pack_32_row(struct tile_out o, enum keel_dtype type, const uint8_t *src, uint64_t kb_n, uint32_t r)
{
    const uint32_t size = keel_dtype_info(type)->block_bytes;
    for (uint64_t kb = 0; kb < kb_n; kb++) {
        const uint8_t *b = src + kb * size;
        const bool has_min = type == KEEL_Q4_1 || type == KEEL_Q5_1;
        if (has_min) {
            o.s[kb * TILE + r] = u32_at(b);
        } else {
            set_half(&o.s[kb * 32 + r / 2], r & 1, u16_at(b));
        }
        const uint8_t *p = b + (has_min ? 4 : 2);
        if (type == KEEL_Q5_0 || type == KEEL_Q5_1) {
            o.h[kb * TILE + r] = u32_at(p);
            p += 4;
        }
        if (type == KEEL_Q8_0) {
            memcpy(o.q + ((kb * 2) * TILE + r) * 4, p, 16);
            memcpy(o.q + ((kb * 2 + 1) * TILE + r) * 4, p + 16, 16);
        } else {
            pack_nibbles(o.q + (kb * TILE + r) * 4, p);
        }
    }
}

static void pack_k45_row(struct tile_out o, enum keel_dtype type, const uint8_t *src, uint64_t sb_n, uint32_t r)
{
    const uint32_t size = keel_dtype_info(type)->block_bytes;
    for (uint64_t sb = 0; sb < sb_n; sb++) {
        const uint8_t *b = src + sb * size;
        const uint8_t *qh = b + 16, *qs = b + (type == KEEL_Q5_K ? 48 : 16);
        o.d[sb * TILE + r] = u32_at(b);
        for (uint32_t i = 0; i < 8; i++) {
            set_half(&o.s[(sb * TILE + r) * 4 + i / 2], i & 1, (uint16_t)scale_min_k(b + 4, i));
            pack_nibbles_k(o.q + ((sb * 8 + i) * TILE + r) * 4, qs + i / 2 * 32, i & 1);
            if (type == KEEL_Q5_K) {
                uint32_t h = 0;
                for (uint32_t c = 0; c < 32; c++) {
                    h |= (uint32_t)(qh[c] >> i & 1) << c;
                }
                o.h[(sb * 8 + i) * TILE + r] = h;
            }
        }
    }
}

static void pack_q6_row(struct tile_out o, const uint8_t *src, uint64_t sb_n, uint32_t r)
{
    for (uint64_t sb = 0; sb < sb_n; sb++) {
        const uint8_t *ql = src + sb * 210, *qh = ql + 128, *sc = qh + 64;
        set_half(&o.d[sb * 32 + r / 2], r & 1, u16_at(sc + 16));
        memcpy(o.s + (sb * TILE + r) * 4, sc, 16);
        for (uint32_t i = 0; i < 8; i++) { // block of 32 columns; 4 of them share 64 bytes of ql and 32 of qh
            const uint8_t *h = qh + i / 4 * 32;
            pack_nibbles_k(o.q + ((sb * 8 + i) * TILE + r) * 4, ql + i / 4 * 64 + (i & 1) * 32, (i & 3) / 2);
            for (uint32_t half = 0; half < 2; half++) {
                uint32_t w = 0;
                for (uint32_t c = 0; c < 16; c++) {
                    w |= (uint32_t)(h[half * 16 + c] >> (2 * (i & 3)) & 3) << (2 * c);
                }
                o.h[((sb * 8 + i) * TILE + r) * 2 + half] = w;
            }
        }
    }
}

static void pack_tile(enum keel_dtype type, const uint8_t *src, uint64_t rows, uint64_t cols, uint32_t *dst)
{
    const uint64_t kb = (cols + 31) / 32;
    const struct sections n = sections_of(type, kb);
    const struct keel_dtype_info *info = keel_dtype_info(type);
    const uint64_t row_bytes = cols / info->block_elems * info->block_bytes;
    const struct tile_out o = { dst, dst + n.q, dst + n.q + n.h, dst + n.q + n.h + n.s };
    memset(dst, 0, (size_t)tile_bytes(type, cols));
    for (uint32_t r = 0; r < rows; r++, src += row_bytes) {
        switch (type) {
        case KEEL_F32:
        case KEEL_F16:
        case KEEL_BF16:
            pack_float_row(o, type, src, cols, r);
            break;
        case KEEL_Q4_K:
        case KEEL_Q5_K:
            pack_k45_row(o, type, src, kb / 8, r);
            break;
        case KEEL_Q6_K:
            pack_q6_row(o, src, kb / 8, r);
            break;
        default:
            pack_32_row(o, type, src, kb, r);
        }
    }
}

struct pack_job {
    enum keel_dtype type;
    const uint8_t *src;
    uint64_t rows, cols, row_bytes, tile_bytes;
    uint8_t *dst;
};

static void pack_one(void *user, uint32_t i)
{
    const struct pack_job *j = user;
    const uint64_t row = (uint64_t)i * TILE;
    pack_tile(j->type, j->src + row * j->row_bytes, KEEL_MIN((uint64_t)TILE, j->rows - row), j->cols,
              (uint32_t *)(void *)(j->dst + i * j->tile_bytes));
}

static struct pack_job pack_job_of(enum keel_dtype type, const void *src, uint64_t rows, uint64_t cols, void *dst)
{
    const struct keel_dtype_info *info = keel_dtype_info(type);
    return (struct pack_job){ .type = type, .src = src, .rows = rows, .cols = cols, .dst = dst,
                              .row_bytes = cols / info->block_elems * info->block_bytes,
                              .tile_bytes = tile_bytes(type, cols) };
}

void keel_tile_pack(enum keel_dtype type, const void *src, uint64_t rows, uint64_t cols, void *dst)
{
    struct pack_job j = pack_job_of(type, src, rows, cols, dst);
    const uint32_t tiles = (uint32_t)((rows + TILE - 1) / TILE);
    for (uint32_t i = 0; i < tiles; i++) {
        pack_one(&j, i);
    }
}

// Packs and uploads one shard through stages of whole tiles.
static keel_status upload_shard(keel_device *dev, struct keel_span span, enum keel_dtype type, const uint8_t *src,
                                uint32_t rows, uint32_t cols, const struct keel_map *map)
{
    keel_status st = KEEL_OK;
    struct pack_job j = pack_job_of(type, src, rows, cols, NULL);
    const uint32_t tiles = keel_div_up(rows, TILE);
    uint32_t step = (uint32_t)(KEEL_STAGE_MAX / j.tile_bytes);
    void *buffer = NULL;
    if (step == 0) { // a tile larger than a stage: pack aside, upload in parts
        buffer = malloc(j.tile_bytes);
        if (!buffer) {
            KEEL_FAIL(keel_device_log(dev), KEEL_ERR_NO_MEMORY, "out of memory for a tile of %llu bytes",
                      (unsigned long long)j.tile_bytes);
        }
        step = 1;
    }
    // Stages must begin at multiples of 256 bytes: an even number of tiles does (a tile is a multiple of 128).
    step = step > 1 ? step & ~1u : step;
    for (uint32_t i = 0; i < tiles; i += step) {
        struct pack_job part = j;
        const uint32_t n = KEEL_MIN(step, tiles - i);
        part.src = src + (uint64_t)i * TILE * j.row_bytes;
        part.rows = rows - (uint64_t)i * TILE;
        const uint64_t offset = i * j.tile_bytes, bytes = n * j.tile_bytes;
        if (buffer) {
            part.dst = buffer;
            pack_one(&part, 0);
            for (uint64_t at = 0; at < bytes; at += KEEL_STAGE_MAX) {
                const size_t len = (size_t)KEEL_MIN((uint64_t)KEEL_STAGE_MAX, bytes - at);
                void *dst;
                KEEL_TRY(keel_stage_begin(dev, keel_span_sub(span, offset + at, len), len, &dst));
                memcpy(dst, (uint8_t *)buffer + at, len);
                KEEL_TRY(keel_stage_end(dev));
            }
        } else {
            void *dst;
            KEEL_TRY(keel_stage_begin(dev, keel_span_sub(span, offset, bytes), (size_t)bytes, &dst));
            part.dst = dst;
            keel_parallel_for(n, pack_one, &part);
            KEEL_TRY(keel_stage_end(dev));
        }
        if (map) {
            keel_map_done_with(map, (size_t)(part.src - map->data),
                               (size_t)(KEEL_MIN((uint64_t)n * TILE, part.rows) * j.row_bytes));
        }
    }
out:
    free(buffer);
    return st;
}

keel_status keel_matrix_create(struct keel_matrix *m, keel_device *dev, keel_heap *heap, enum keel_dtype type,
                               uint32_t rows, uint32_t cols, const void *src, const struct keel_map *map)
{
    keel_status st = KEEL_OK;
    const struct keel_caps *caps = keel_device_caps(dev);
    const struct keel_dtype_info *info = keel_dtype_info(type);
    const uint64_t row_bytes = (uint64_t)cols / info->block_elems * info->block_bytes;
    const uint64_t one = tile_bytes(type, cols);
    const uint64_t limit = KEEL_MIN(caps->max_range, caps->max_buffer) / one & ~UINT64_C(1); // tiles a shard
    *m = (struct keel_matrix){ .type = type, .rows = rows, .cols = cols };
    const uint32_t tiles = keel_div_up(rows, TILE);
    if (limit == 0 || keel_div_up(tiles, (uint32_t)KEEL_MIN(limit, (uint64_t)tiles)) > KEEL_MAX_SHARDS) {
        KEEL_FAIL(keel_device_log(dev), KEEL_ERR_UNSUPPORTED,
                  "a matrix of %u x %u %s does not fit this device's bindings of %llu bytes", rows, cols, info->name,
                  (unsigned long long)caps->max_range);
    }
    for (uint32_t tile = 0; tile < tiles;) {
        const uint32_t n = (uint32_t)KEEL_MIN(limit, (uint64_t)(tiles - tile));
        struct keel_shard *s = &m->shard[m->n_shards++];
        s->row0 = tile * TILE;
        s->rows = KEEL_MIN(n * TILE, rows - s->row0);
        KEEL_TRY(keel_heap_alloc(heap, keel_tile_bytes(type, s->rows, cols), &s->span));
        KEEL_TRY(upload_shard(dev, s->span, type, (const uint8_t *)src + s->row0 * row_bytes, s->rows, cols, map));
        tile += n;
    }
out:
    return st;
}
