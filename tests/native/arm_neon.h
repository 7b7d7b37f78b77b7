/* A C model of the few NEON instructions that gf256.c uses, after Arm's Intrinsics Reference. */

#pragma once

typedef struct {
    uint8_t byte[16];
} uint8x16_t;

static inline uint8x16_t vld1q_u8(const uint8_t *p) {
    uint8x16_t v;
    memcpy(&v, p, 16);
    return v;
}
static inline void vst1q_u8(uint8_t *p, uint8x16_t v) { memcpy(p, &v, 16); }
static inline uint8x16_t vdupq_n_u8(uint8_t x) {
    uint8x16_t v;
    memset(&v, x, 16);
    return v;
}
#define MODEL(NAME, RESULT)                                                                                            \
    static inline uint8x16_t NAME(uint8x16_t a, uint8x16_t b) {                                                        \
        uint8x16_t v;                                                                                                  \
        for (int i = 0; i < 16; i++) v.byte[i] = (RESULT);                                                             \
        return v;                                                                                                      \
    }
MODEL(veorq_u8, a.byte[i] ^ b.byte[i])
MODEL(vandq_u8, a.byte[i] & b.byte[i])
MODEL(vqtbl1q_u8, b.byte[i] < 16 ? a.byte[b.byte[i]] : 0)
static inline uint8x16_t vshrq_n_u8(uint8x16_t a, int bits) {
    for (int i = 0; i < 16; i++) a.byte[i] = (uint8_t)(a.byte[i] >> bits);
    return a;
}
