/* A ceiling for benches: XOR of n shards, read side by side as the codec reads them, with nothing written, in the widest
   vectors that the processor has. */

#include <stddef.h>
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Four vectors of WIDTH bytes of every shard at a time; the compiler's vector types, in the target's registers. */
#define READ(NAME, ATTRIBUTES, WIDTH)                                                                                  \
    typedef uint64_t NAME##_v __attribute__((vector_size(WIDTH), aligned(1), may_alias));                              \
    ATTRIBUTES static uint64_t NAME(int columns, size_t length, const uint8_t *const *sources) {                       \
        NAME##_v a = {0}, b = {0}, c = {0}, d = {0};                                                                   \
        for (size_t i = 0; i + 4 * WIDTH <= length; i += 4 * WIDTH)                                                    \
            for (int j = 0; j < columns; j++) {                                                                        \
                const NAME##_v *p = (const NAME##_v *)(sources[j] + i);                                                \
                a ^= p[0], b ^= p[1], c ^= p[2], d ^= p[3];                                                            \
            }                                                                                                          \
        a ^= b ^ c ^ d;                                                                                                \
        uint64_t all = 0;                                                                                              \
        for (int k = 0; k < WIDTH / 8; k++) all ^= a[k];                                                               \
        return all;                                                                                                    \
    }

READ(read_16, , 16)

#if defined(__x86_64__)
READ(read_32, __attribute__((target("avx2"))), 32)
READ(read_64, __attribute__((target("avx512f,avx512bw,avx512vl,avx2"))), 64)
#endif

/* `width`: bytes of a vector, 64, 32 or 16, which the caller knows to be supported. A tail below 4 vectors is left out. */
EXPORT uint64_t ghostserve_read(int width, int columns, size_t length, const uint8_t *const *sources) {
#if defined(__x86_64__)
    if (width == 64) return read_64(columns, length, sources);
    if (width == 32) return read_32(columns, length, sources);
#endif
    (void)width;
    return read_16(columns, length, sources);
}
