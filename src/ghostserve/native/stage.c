/* What a step wrote: slots of KV blocks, copied out of a rank's memory into packed logs, each with a running crc32.

   One call does it for all pieces of a step. A piece appends slots [start, stop) of a block to the log in a frame; the
   checksum covers the log from its first byte, so it goes on from where an earlier step ended. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define POINTS 4  /* steps in flight, and one */
#define HEADER 4  /* words of a piece before its frames: block, group, start, stop */

/* `count` units of `bytes` bytes, `step` bytes apart; the same in all slots. `stride`: bytes from one block to the next. */
struct run { int64_t count, bytes, step, stride; };

/* One KV group. A slot is `run_count` runs, one after the other in the log. */
struct slots {
    const struct run *runs;
    const int64_t *offsets;  /* [block_size][run_count]: where a run begins in the KV memory, for block 0 */
    uint64_t run_count, slot_bytes, block_size;
};

/* The checksum of a log after so many slots, for the last few steps: after a loss they are staged again. */
struct log {
    uint32_t count;
    struct { uint32_t slots, crc; } points[POINTS];
};

struct mirror {
    uint8_t *kv;
    uint8_t *frames;
    struct log *logs;             /* [frame_count] */
    const struct slots *groups;
    uint64_t frame_bytes, frame_count, block_count, group_count;
};

/* ---- crc32 as zlib's: polynomial 0xedb88320, reflected, inverted before and after ---------------------------------------- */

static uint32_t table[8][256];

static void make_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0xedb88320u : c >> 1;
        table[0][i] = c;
    }
    for (int t = 1; t < 8; t++)
        for (int i = 0; i < 256; i++) table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 255];
}

/* Eight bytes a turn, by as many tables. `c` is inverted already. */
static uint32_t crc_tables(uint32_t c, const uint8_t *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= c;
        c = 0;
        for (int t = 0; t < 8; t++) c ^= table[7 - t][word >> 8 * t & 255];
    }
    for (; n; p++, n--) c = c >> 8 ^ table[0][(c ^ *p) & 255];
    return c;
}

#if defined(__x86_64__)
#define FOLDING __attribute__((target("pclmul,sse4.1")))

/* `x` moved on by as far as the constants say, plus `next`. */
FOLDING static inline __m128i fold(__m128i x, __m128i constants, __m128i next) {
    const __m128i low = _mm_clmulepi64_si128(x, constants, 0x00), high = _mm_clmulepi64_si128(x, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

FOLDING static inline __m128i at(const uint8_t *p, int i) { return _mm_loadu_si128((const __m128i *)p + i); }

/* Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009: remainders of x to the 512,
   128 and 64 (with 32 on either side), then Barrett's reduction. n is at least 64 and a multiple of 16. */
FOLDING static uint32_t crc_fold(uint32_t c, const uint8_t *p, size_t n) {
    const __m128i by_512 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), by_128 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    const __m128i by_64 = _mm_set_epi64x(0, 0x163cd6124), barrett = _mm_set_epi64x(0x1f7011641, 0x1db710641);
    const __m128i words = _mm_set_epi32(0, -1, 0, -1);
    __m128i a = _mm_xor_si128(at(p, 0), _mm_cvtsi32_si128((int)c)), b = at(p, 1), d = at(p, 2), e = at(p, 3);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        a = fold(a, by_512, at(p, 0));
        b = fold(b, by_512, at(p, 1));
        d = fold(d, by_512, at(p, 2));
        e = fold(e, by_512, at(p, 3));
    }
    a = fold(fold(fold(a, by_128, b), by_128, d), by_128, e);
    for (; n; p += 16, n -= 16) a = fold(a, by_128, at(p, 0));
    a = _mm_xor_si128(_mm_srli_si128(a, 8), _mm_clmulepi64_si128(a, by_128, 0x10));
    a = _mm_xor_si128(_mm_srli_si128(a, 4), _mm_clmulepi64_si128(_mm_and_si128(a, words), by_64, 0x00));
    __m128i q = _mm_clmulepi64_si128(_mm_and_si128(a, words), barrett, 0x10);
    q = _mm_clmulepi64_si128(_mm_and_si128(q, words), barrett, 0x00);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(a, q), 1);
}

static int can_fold(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 1 & 1) && (c >> 19 & 1);
}
#endif

EXPORT uint32_t ghostserve_crc32(uint32_t crc, const uint8_t *p, size_t n) {
    static int ready, folds;
    if (!__atomic_load_n(&ready, __ATOMIC_ACQUIRE)) { /* threads that race here write the same */
        make_table();
#if defined(__x86_64__)
        folds = can_fold();
#endif
        __atomic_store_n(&ready, 1, __ATOMIC_RELEASE);
    }
    uint32_t c = ~crc;
#if defined(__x86_64__)
    if (folds && n >= 64) {
        const size_t whole = n & ~(size_t)15;
        c = crc_fold(c, p, whole);
        p += whole, n -= whole;
    }
#else
    (void)folds;
#endif
    return ~crc_tables(c, p, n);
}

/* ---- staging ------------------------------------------------------------------------------------------------------------ */

#define UNITS(BYTES)                                                                                                   \
    case BYTES:                                                                                                        \
        for (int64_t i = 0; i < count; i++, to += to_step ? to_step : BYTES, from += from_step ? from_step : BYTES)    \
            memcpy(to, from, BYTES);                                                                                   \
        break

/* `count` units of `bytes` bytes, so many bytes apart there and here; 0, and known when this is compiled: packed. */
static inline __attribute__((always_inline)) void copy_units(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t from_step, int64_t count, int64_t bytes) {
    switch (bytes) { /* vLLM keeps the keys of a CPU by dimension: a slot's are single elements */
    UNITS(1);
    UNITS(2);
    UNITS(4);
    UNITS(8);
    default:
        for (int64_t i = 0; i < count; i++, to += to_step ? to_step : bytes, from += from_step ? from_step : bytes)
            memcpy(to, from, (size_t)bytes);
    }
}

static void gather(const struct mirror *m, const struct slots *s, uint32_t block, uint32_t start, uint32_t stop, uint8_t *out) {
    for (uint32_t slot = start; slot < stop; slot++) {
        const int64_t *offsets = s->offsets + (size_t)slot * s->run_count;
        for (uint64_t r = 0; r < s->run_count; r++) {
            const struct run *run = &s->runs[r];
            const uint8_t *kv = m->kv + offsets[r] + (int64_t)block * run->stride;
            copy_units(out, 0, kv, run->step, run->count, run->bytes);
            out += run->count * run->bytes;
        }
    }
}

/* The crc32 of the frame's log with slots up to `stop` in it. */
static uint32_t append(const struct mirror *m, const struct slots *s, uint32_t block, uint32_t start, uint32_t stop,
                       uint64_t frame) {
    struct log *log = &m->logs[frame];
    uint32_t i = 0;
    while (i < log->count && log->points[i].slots != start) i++;
    if (i == log->count || start == 0) { /* a new log, or the step before was not staged: all of it, from what is there */
        start = i = 0;
        log->points[0].slots = log->points[0].crc = 0;
    }
    uint8_t *out = m->frames + frame * m->frame_bytes + start * s->slot_bytes;
    log->count = 0; /* dying in between must not leave a point that does not hold; nothing reads it but this process */
    gather(m, s, block, start, stop, out);
    const uint32_t crc = ghostserve_crc32(log->points[i].crc, out, (size_t)(stop - start) * s->slot_bytes);
    if (i == POINTS - 1) {
        memmove(&log->points[0], &log->points[1], sizeof log->points[0] * (POINTS - 1));
        i--;
    }
    log->points[i + 1].slots = stop;
    log->points[i + 1].crc = crc;
    log->count = i + 2;
    return crc;
}

/* `pieces`: `count` times HEADER words and `ranks` frames. Writes `count` checksums. Returns how many pieces were done:
   less than `count` if one is out of bounds. */
EXPORT size_t ghostserve_stage(const struct mirror *m, const uint32_t *pieces, size_t count, uint32_t ranks, uint32_t rank,
                               uint32_t *checksums) {
    for (size_t k = 0; k < count; k++, pieces += HEADER + ranks) {
        const uint32_t block = pieces[0], group = pieces[1], start = pieces[2], stop = pieces[3];
        const uint64_t frame = pieces[HEADER + rank];
        if (group >= m->group_count || block >= m->block_count || frame >= m->frame_count) return k;
        const struct slots *s = &m->groups[group];
        if (start >= stop || stop > s->block_size || stop * s->slot_bytes > m->frame_bytes) return k;
        checksums[k] = append(m, s, block, start, stop, frame);
    }
    return count;
}

/* ---- whole blocks, after a loss ----------------------------------------------------------------------------------------- */

static const struct slots *within(const struct mirror *m, uint32_t block, uint32_t group, uint32_t slots) {
    if (group >= m->group_count || block >= m->block_count || slots > m->groups[group].block_size) return NULL;
    return &m->groups[group];
}

/* The first `slots` slots of a block, as a packed log. Returns 0 if they are out of bounds, nothing is copied then. */
EXPORT int ghostserve_gather(const struct mirror *m, uint32_t block, uint32_t group, uint32_t slots, uint8_t *log) {
    const struct slots *s = within(m, block, group, slots);
    if (s) gather(m, s, block, 0, slots, log);
    return s != NULL;
}

/* And back: the only thing here that writes KV memory. */
EXPORT int ghostserve_scatter(const struct mirror *m, uint32_t block, uint32_t group, uint32_t slots, const uint8_t *log) {
    const struct slots *s = within(m, block, group, slots);
    for (uint32_t slot = 0; s && slot < slots; slot++) {
        const int64_t *offsets = s->offsets + (size_t)slot * s->run_count;
        for (uint64_t r = 0; r < s->run_count; r++) {
            const struct run *run = &s->runs[r];
            uint8_t *kv = m->kv + offsets[r] + (int64_t)block * run->stride;
            copy_units(kv, run->step, log, 0, run->count, run->bytes);
            log += run->count * run->bytes;
        }
    }
    return s != NULL;
}

/* For the loader: what it allocates has to fit. */
EXPORT size_t ghostserve_log_bytes(void) { return sizeof(struct log); }

/* A log that a predecessor left: `slots` slots with this checksum. */
EXPORT void ghostserve_seed(const struct mirror *m, uint64_t frame, uint32_t slots, uint32_t crc) {
    struct log *log = &m->logs[frame];
    log->count = 1;
    log->points[0].slots = slots;
    log->points[0].crc = crc;
}
