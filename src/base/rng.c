// SPDX-License-Identifier: MIT
// base/rng.c: Philox4x32-10. Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#include "base.h"

#include <math.h>

void keel_philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint32_t c[4] = { (uint32_t)counter, (uint32_t)(counter >> 32), (uint32_t)stream, (uint32_t)(stream >> 32) };
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0];
        const uint64_t b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0;
        const uint32_t n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[0] = n0;
        c[1] = (uint32_t)b;
        c[2] = n2;
        c[3] = (uint32_t)a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) {
        out[i] = c[i];
    }
}

struct keel_rng keel_rng_make(uint64_t seed, uint64_t stream)
{
    return (struct keel_rng){ .seed = seed, .stream = stream };
}

uint32_t keel_rng_u32(struct keel_rng *rng)
{
    if (rng->left == 0) {
        keel_philox(rng->buf, rng->seed, rng->stream, rng->counter++);
        rng->left = 4;
    }
    return rng->buf[--rng->left];
}

uint32_t keel_rng_below(struct keel_rng *rng, uint32_t n)
{
    const uint32_t reject = (uint32_t)(-n) % n; // values below 2^32 mod n would be drawn too often
    uint32_t x;
    do {
        x = keel_rng_u32(rng);
    } while (x < reject);
    return x % n;
}

double keel_rng_uniform(struct keel_rng *rng)
{
    const uint64_t hi = keel_rng_u32(rng) >> 5, lo = keel_rng_u32(rng) >> 6;
    return (double)(hi << 26 | lo) * 0x1p-53;
}

double keel_rng_normal(struct keel_rng *rng)
{
    const double u = 1.0 - keel_rng_uniform(rng); // (0, 1], so that the logarithm is finite
    const double v = keel_rng_uniform(rng);
    return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}
