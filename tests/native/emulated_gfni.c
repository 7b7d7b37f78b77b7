/* gf256.c with its AVX-512 and GFNI instructions replaced by a C model of them, for machines that lack them.
   The model follows Intel's Software Developer's Manual; test_codec_native.py checks the constants separately. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint8_t byte[64];
} model512;

static inline model512 model_load(const void *p) {
    model512 v;
    memcpy(&v, p, 64);
    return v;
}
static inline void model_store(void *p, model512 v) { memcpy(p, &v, 64); }
static inline void model_stream(void *p, model512 v) {
    if ((uintptr_t)p & 63) __builtin_trap(); /* faults on the real thing */
    memcpy(p, &v, 64);
}
static inline model512 model_xor(model512 a, model512 b) {
    for (int i = 0; i < 64; i++) a.byte[i] ^= b.byte[i];
    return a;
}
static inline model512 model_zero(void) { return (model512){{0}}; }
static inline model512 model_set(long long x) {
    model512 v;
    for (int i = 0; i < 8; i++) memcpy(v.byte + 8 * i, &x, 8);
    return v;
}
/* For each byte: bit i of the result is the parity of (byte 7 - i of the matrix in its 64-bit lane) AND x. */
static inline model512 model_affine(model512 x, model512 a, int constant) {
    model512 y;
    for (int at = 0; at < 64; at++) {
        uint8_t made = 0;
        for (int i = 0; i < 8; i++)
            made |= (uint8_t)(__builtin_parity(a.byte[at / 8 * 8 + 7 - i] & x.byte[at]) << i);
        y.byte[at] = made ^ (uint8_t)constant;
    }
    return y;
}

#define __m512i model512
#define _mm512_loadu_si512 model_load
#define _mm512_storeu_si512 model_store
#define _mm512_stream_si512 model_stream
#define _mm512_xor_si512 model_xor
#define _mm512_setzero_si512 model_zero
#define _mm512_set1_epi64 model_set
#define _mm512_gf2p8affine_epi64_epi8 model_affine
#define T_GFNI
#define GHOSTSERVE_EMULATED
#include "gf256.c"
#include "read.c"
