/* Matrix times shards over GF(2^8), polynomial 0x11d.

   The field itself lives in codec/field.py: tables come ready made, and only the multiplication by two (0x1d) is
   known here. Every path gives the same bytes. No allocation, no global state, no threads, no CPython.

   Up to four targets are made in one pass over the sources, a chunk at a time: accumulators stay in registers, every
   source comes from memory once. The end that does not fill a vector is covered by one that overlaps what is done.

   References: J. S. Plank, K. M. Greenan, E. L. Miller, "Screaming Fast Galois Field Arithmetic Using Intel SIMD
   Instructions", FAST 2013 (nibble shuffle); H. P. Anvin, "The mathematics of RAID-6" (Horner's rule). */

#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define ROWS 4         /* targets that are made in one pass over the sources */
#define CACHED_BYTES (16 << 10)
#define TABLE_BYTES 32 /* of one coefficient: c * 0..15, then c * 0x00, 0x10 .. 0xf0 */

enum path { PORTABLE = 0, AVX2 = 1, GFNI512 = 2, NEON = 3 };

enum flags {
    ACCUMULATE = 1, /* add to what the targets hold */
    FIRST_ROW_XOR = 2, /* row 0 is ones */
    POWERS = 4, /* row r is 1, g, g^2 ... with g = 2^r, r < 3: Horner's rule needs no tables */
    STREAM = 8, /* targets will not be read soon: write around the cache */
};

struct job {
    int columns;
    const u8 *tables;         /* rows * columns * TABLE_BYTES */
    const uint64_t *matrices; /* rows * columns, the 8x8 bit matrices of GF2P8AFFINEQB */
    const u8 *const *sources;
    u8 *const *targets;
    unsigned flags;
};

/* Bytes [from, to), one at a time. */
static void by_bytes(const struct job *job, int rows, size_t from, size_t to) {
    for (int r = 0; r < rows; r++) {
        const u8 *table = job->tables + (size_t)r * job->columns * TABLE_BYTES;
        for (size_t i = from; i < to; i++) {
            u8 sum = job->flags & ACCUMULATE ? job->targets[r][i] : 0;
            for (int j = 0; j < job->columns; j++) {
                u8 x = job->sources[j][i];
                sum ^= table[j * TABLE_BYTES + (x & 15)] ^ table[j * TABLE_BYTES + 16 + (x >> 4)];
            }
            job->targets[r][i] = sum;
        }
    }
}

/* ---- portable: vectors of the compiler, coefficients bit by bit ------------------------------------------------- */

typedef u8 v16 __attribute__((vector_size(16)));
typedef int8_t v16s __attribute__((vector_size(16)));
typedef u8 v16u __attribute__((vector_size(16), aligned(1), may_alias));

INLINE v16 twice16(v16 x) { return (x + x) ^ ((v16)((v16s)x < 0) & 0x1d); }

static void portable(const struct job *job, int rows, size_t from, size_t to) {
    enum { U = 4 };
    const int columns = job->columns;
    for (size_t i = from; i + sizeof(v16) * U <= to; i += sizeof(v16) * U)
        for (int r = 0; r < rows; r++) {
            const u8 *table = job->tables + (size_t)r * columns * TABLE_BYTES;
            u8 any = 0;
            for (int j = 0; j < columns; j++) any |= table[j * TABLE_BYTES + 1]; /* c * 1 */
            v16 sum[U] = {{0}};
            for (int bit = 7; bit >= 0; bit--) {
                if (!(any >> bit)) continue;
                for (int u = 0; u < U; u++) sum[u] = twice16(sum[u]);
                for (int j = 0; j < columns; j++)
                    if (table[j * TABLE_BYTES + 1] >> bit & 1)
                        for (int u = 0; u < U; u++) sum[u] ^= *(const v16u *)(job->sources[j] + i + sizeof(v16) * u);
            }
            for (int u = 0; u < U; u++) {
                v16u *out = (v16u *)(job->targets[r] + i + sizeof(v16) * u);
                if (job->flags & ACCUMULATE) sum[u] ^= *out;
                *out = sum[u];
            }
        }
    const size_t done = from + (to - from) / (sizeof(v16) * U) * (sizeof(v16) * U);
    by_bytes(job, rows, done, to);
}

/* ---- the loop that the vector paths share -------------------------------------------------------------------------
   R targets, U vectors of W bytes at a time; X: row 0 is ones. `V` and the operations are macros of the path. */

#define CHUNK_LOOP(NAME, ATTRIBUTES, V, W, U, SETUP, TABLES, PREPARE, MULTIPLY)                                       \
    ATTRIBUTES INLINE void NAME(const struct job *job, const int R, const int X, size_t from, size_t to) {             \
        const int columns = job->columns;                                                                              \
        const u8 *const *const sources = job->sources;                                                                 \
        const unsigned flags = job->flags;                                                                             \
        u8 *targets[ROWS];                                                                                             \
        for (int r = 0; r < R; r++) targets[r] = job->targets[r];                                                      \
        SETUP;                                                                                                         \
        for (size_t i = from; i < to; i += (W) * (U)) {                                                                \
            V sum[ROWS][U];                                                                                            \
            for (int r = 0; r < R; r++)                                                                                \
                for (int u = 0; u < (U); u++)                                                                          \
                    sum[r][u] = flags & ACCUMULATE ? LOAD(targets[r] + i + (W) * u) : ZERO();                \
            for (int j = 0; j < columns; j++) {                                                                        \
                V x[U];                                                                                                \
                for (int u = 0; u < (U); u++) x[u] = LOAD(sources[j] + i + (W) * u);                              \
                if (X)                                                                                                 \
                    for (int u = 0; u < (U); u++) sum[0][u] = XOR(sum[0][u], x[u]);                                    \
                if (R > X) {                                                                                           \
                    PREPARE;                                                                                           \
                    for (int r = X; r < R; r++) {                                                                      \
                        TABLES;                                                                                        \
                        for (int u = 0; u < (U); u++) sum[r][u] = XOR(sum[r][u], MULTIPLY);                            \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
            if (flags & STREAM)                                                                                   \
                for (int r = 0; r < R; r++)                                                                            \
                    for (int u = 0; u < (U); u++) STREAM_STORE(targets[r] + i + (W) * u, sum[r][u]);              \
            else                                                                                                       \
                for (int r = 0; r < R; r++)                                                                            \
                    for (int u = 0; u < (U); u++) STORE(targets[r] + i + (W) * u, sum[r][u]);                     \
        }                                                                                                              \
    }

/* The constants R and X make loops of their own: wide steps as far as they go, then single vectors. */
#define SPECIALISE_CASE(R, X, WIDE, ONE, STEP)                                                                         \
    case (R) * 2 + (X): {                                                                                              \
        const size_t mid = from + (to - from) / (STEP) * (STEP);                                                       \
        WIDE(job, R, X, from, mid);                                                                                    \
        ONE(job, R, X, mid, to);                                                                                       \
    } break;

#define SPECIALISE(NAME, ATTRIBUTES, WIDE, ONE, STEP, WIDE_FEW, STEP_FEW)                                              \
    ATTRIBUTES static void NAME(const struct job *job, int rows, size_t from, size_t to) {                             \
        switch (rows * 2 + ((job->flags & FIRST_ROW_XOR) != 0)) {                                                      \
            SPECIALISE_CASE(1, 0, WIDE_FEW, ONE, STEP_FEW)                                                             \
            SPECIALISE_CASE(1, 1, WIDE_FEW, ONE, STEP_FEW)                                                             \
            SPECIALISE_CASE(2, 0, WIDE, ONE, STEP)                                                                     \
            SPECIALISE_CASE(2, 1, WIDE, ONE, STEP)                                                                     \
            SPECIALISE_CASE(3, 0, WIDE, ONE, STEP)                                                                     \
            SPECIALISE_CASE(3, 1, WIDE, ONE, STEP)                                                                     \
            SPECIALISE_CASE(4, 0, WIDE, ONE, STEP)                                                                     \
            SPECIALISE_CASE(4, 1, WIDE, ONE, STEP)                                                                     \
        }                                                                                                              \
    }

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* ---- AVX2: two nibble shuffles for each product; Horner's rule for the powers of two ------------------------------ */

#define T_AVX2 __attribute__((target("avx2")))
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define STREAM_STORE(p, v) _mm256_stream_si256((__m256i *)(p), v)
#define XOR _mm256_xor_si256
#define ZERO _mm256_setzero_si256
#define AVX2_SETUP const __m256i nibble = _mm256_set1_epi8(15)
#define AVX2_PREPARE(U)                                                                                                \
    __m256i low[U], high[U];                                                                                           \
    for (int u = 0; u < (U); u++) {                                                                                    \
        low[u] = _mm256_and_si256(x[u], nibble);                                                                       \
        high[u] = _mm256_and_si256(_mm256_srli_epi64(x[u], 4), nibble);                                                \
    }
#define AVX2_TABLES                                                                                                    \
    const u8 *table = job->tables + ((size_t)r * columns + j) * TABLE_BYTES;                                           \
    const __m256i of_low = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));                       \
    const __m256i of_high = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(table + 16)))
#define AVX2_MULTIPLY XOR(_mm256_shuffle_epi8(of_low, low[u]), _mm256_shuffle_epi8(of_high, high[u]))

CHUNK_LOOP(avx2_chunks, T_AVX2, __m256i, 32, 2, AVX2_SETUP, AVX2_TABLES, AVX2_PREPARE(2), AVX2_MULTIPLY)
CHUNK_LOOP(avx2_chunks_few, T_AVX2, __m256i, 32, 4, AVX2_SETUP, AVX2_TABLES, AVX2_PREPARE(4), AVX2_MULTIPLY)
CHUNK_LOOP(avx2_ones, T_AVX2, __m256i, 32, 1, AVX2_SETUP, AVX2_TABLES, AVX2_PREPARE(1), AVX2_MULTIPLY)
SPECIALISE(avx2, T_AVX2, avx2_chunks, avx2_ones, 64, avx2_chunks_few, 128)

/* Each byte times two, plus 0x1d: looked up by x, sixteen bytes of 0x1d give 0x1d where bit 7 is clear and 0 where it
   is set, which is the carry the wrong way round. What that adds up to depends on nothing but the number of sources, and
   is taken off at the end. */
T_AVX2 INLINE __m256i twice_and_1d(__m256i x) {
    return XOR(_mm256_add_epi8(x, x), _mm256_shuffle_epi8(_mm256_set1_epi8(0x1d), x));
}

static u8 twice(u8 x) { return (u8)(x << 1 ^ (x >> 7) * 0x1d); }

/* P, Q and R: sum = g * sum + x, from the last source to the first; U vectors at a time. */
T_AVX2 INLINE void avx2_horner(const struct job *job, const int R, const int U, size_t from, size_t to) {
    enum { W = 32, U_MAX = 2 };
    const u8 *const *const sources = job->sources;
    const unsigned flags = job->flags;
    const int last = job->columns - 1;
    u8 extra_q = 0, extra_r = 0;
    for (int j = 0; j < last; j++) extra_q = twice(extra_q) ^ 0x1d, extra_r = twice(twice(extra_r) ^ 0x1d) ^ 0x1d;
    const __m256i extra[3] = {ZERO(), _mm256_set1_epi8((char)extra_q), _mm256_set1_epi8((char)extra_r)};
    for (size_t i = from; i < to; i += W * (size_t)U) {
        __m256i sum[3][U_MAX];
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) sum[r][u] = LOAD(sources[last] + i + W * u);
        for (int j = last - 1; j >= 0; j--) {
            for (int u = 0; u < U; u++) {
                const __m256i x = LOAD(sources[j] + i + W * u);
                sum[0][u] = XOR(sum[0][u], x);
                sum[1][u] = XOR(twice_and_1d(sum[1][u]), x);
                if (R > 2) sum[2][u] = XOR(twice_and_1d(twice_and_1d(sum[2][u])), x);
            }
        }
        for (int r = 0; r < R; r++)
            for (int u = 0; u < U; u++) {
                u8 *out = job->targets[r] + i + W * u;
                __m256i made = r ? XOR(sum[r][u], extra[r]) : sum[r][u];
                if (flags & ACCUMULATE) made = XOR(made, LOAD(out));
                if (flags & STREAM)
                    STREAM_STORE(out, made);
                else
                    STORE(out, made);
            }
    }
}

T_AVX2 static void avx2_powers(const struct job *job, int rows, size_t from, size_t to) {
    const size_t mid = from + (to - from) / 64 * 64;
    if (rows == 2) {
        avx2_horner(job, 2, 2, from, mid);
        avx2_horner(job, 2, 1, mid, to);
    } else {
        avx2_horner(job, 3, 2, from, mid);
        avx2_horner(job, 3, 1, mid, to);
    }
}

#undef LOAD
#undef STORE
#undef STREAM_STORE
#undef XOR
#undef ZERO

/* ---- AVX-512 with GFNI: one instruction for each product ------------------------------------------------------------ */

#if defined(__clang__) && __clang_major__ >= 18 && __clang_major__ <= 20 /* they want the width named */
#define WIDE_REGISTERS ",evex512"
#else
#define WIDE_REGISTERS ""
#endif
#ifndef T_GFNI
#define T_GFNI __attribute__((target("avx512f,avx512bw,avx512vl,gfni,avx2" WIDE_REGISTERS)))
#endif
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define STORE(p, v) _mm512_storeu_si512((void *)(p), v)
#define STREAM_STORE(p, v) _mm512_stream_si512((void *)(p), v)
#define XOR _mm512_xor_si512
#define ZERO _mm512_setzero_si512
#define GFNI_TABLES const __m512i factor = _mm512_set1_epi64((long long)job->matrices[(size_t)r * columns + j])
#define GFNI_MULTIPLY _mm512_gf2p8affine_epi64_epi8(x[u], factor, 0)

CHUNK_LOOP(gfni_chunks, T_GFNI, __m512i, 64, 4, (void)0, GFNI_TABLES, (void)0, GFNI_MULTIPLY)
CHUNK_LOOP(gfni_ones, T_GFNI, __m512i, 64, 1, (void)0, GFNI_TABLES, (void)0, GFNI_MULTIPLY)
SPECIALISE(gfni, T_GFNI, gfni_chunks, gfni_ones, 256, gfni_chunks, 256)

#undef LOAD
#undef STORE
#undef STREAM_STORE
#undef XOR
#undef ZERO

#ifdef GHOSTSERVE_EMULATED /* tests/native: instructions are replaced by C, so every path runs anywhere */
static int supports(int path) { return path >= PORTABLE && path <= GFNI512; }
#else
static uint64_t saved_registers(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static int supports(int path) {
    uint32_t a, b, c, d;
    if (path == PORTABLE) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    const uint64_t saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const int avx2 = (saved & 0x6) == 0x6 && (b >> 5 & 1);
    if (path == AVX2) return avx2;
    const int avx512 = (saved & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* F, BW, VL */
    return path == GFNI512 && avx2 && avx512 && (c >> 8 & 1);
}
#endif

static void fence(void) { _mm_sfence(); }

#elif defined(__aarch64__)
#include <arm_neon.h>

/* ---- NEON: two table look-ups for each product ------------------------------------------------------------------------ */

#define LOAD(p) vld1q_u8(p)
#define STORE(p, v) vst1q_u8(p, v)
#define STREAM_STORE STORE
#define XOR veorq_u8
#define ZERO() vdupq_n_u8(0)
#define NEON_SETUP const uint8x16_t nibble = vdupq_n_u8(15)
#define NEON_PREPARE(U)                                                                                                \
    uint8x16_t low[U], high[U];                                                                                        \
    for (int u = 0; u < (U); u++) {                                                                                    \
        low[u] = vandq_u8(x[u], nibble);                                                                               \
        high[u] = vshrq_n_u8(x[u], 4);                                                                                 \
    }
#define NEON_TABLES                                                                                                    \
    const u8 *table = job->tables + ((size_t)r * columns + j) * TABLE_BYTES;                                           \
    const uint8x16_t of_low = vld1q_u8(table), of_high = vld1q_u8(table + 16)
#define NEON_MULTIPLY XOR(vqtbl1q_u8(of_low, low[u]), vqtbl1q_u8(of_high, high[u]))

CHUNK_LOOP(neon_chunks, , uint8x16_t, 16, 4, NEON_SETUP, NEON_TABLES, NEON_PREPARE(4), NEON_MULTIPLY)
CHUNK_LOOP(neon_ones, , uint8x16_t, 16, 1, NEON_SETUP, NEON_TABLES, NEON_PREPARE(1), NEON_MULTIPLY)
SPECIALISE(neon, , neon_chunks, neon_ones, 64, neon_chunks, 64)

static int supports(int path) { return path == PORTABLE || path == NEON; }
static void fence(void) {}

#else
static int supports(int path) { return path == PORTABLE; }
static void fence(void) {}
#endif

/* ---- what is called ---------------------------------------------------------------------------------------------------- */

static void chunks(int path, const struct job *job, int rows, size_t from, size_t to) {
    switch (path) {
#if defined(__x86_64__)
    case AVX2:
        if (job->flags & POWERS && rows > 1)
            avx2_powers(job, rows, from, to);
        else
            avx2(job, rows, from, to);
        break;
    case GFNI512: gfni(job, rows, from, to); break;
#elif defined(__aarch64__)
    case NEON: neon(job, rows, from, to); break;
#endif
    default: portable(job, rows, from, to);
    }
}

/* What a path takes at a time, at least; the portable one takes any length. */
static size_t vector_bytes(int path) {
    switch (path) {
    case AVX2: return 32;
    case GFNI512: return 64;
    case NEON: return 16;
    default: return 1;
    }
}

/* How far the targets are from a 64-byte boundary at `at`, or -1 if they differ: streaming stores need it. */
static int misalignment(u8 *const *targets, int rows, size_t at) {
    const int first = (int)(((uintptr_t)targets[0] + at) & 63);
    for (int r = 1; r < rows; r++)
        if ((int)(((uintptr_t)targets[r] + at) & 63) != first) return -1;
    return first;
}

/* Bytes [begin, end) of up to four targets. */
static void range(int path, const struct job *whole, int rows, size_t begin, size_t end) {
    struct job job = *whole;
    size_t from = begin;
    if (path == GFNI512 && end - begin < vector_bytes(GFNI512)) path = AVX2;
    const size_t vector = vector_bytes(path);
    if (job.flags & STREAM) {
        const int off = misalignment(job.targets, rows, begin);
        if (off > 0) from += 64 - (size_t)off;
        if (off < 0 || from > end) job.flags &= ~(unsigned)STREAM, from = begin;
    }
    by_bytes(&job, rows, begin, from);
    const size_t to = from + (end - from) / vector * vector;
    chunks(path, &job, rows, from, to);
    if (to == end) return;
    job.flags &= ~(unsigned)STREAM;
    if (job.flags & ACCUMULATE || end - begin < vector)
        by_bytes(&job, rows, to, end); /* what is there already must not be added twice */
    else
        chunks(path, &job, rows, end - vector, end);
}

/* Whether this processor and this build have the path. */
EXPORT int ghostserve_gf256_supports(int path) { return supports(path); }

/* Grows whenever a function changes its meaning; the loader compares it. */
EXPORT int ghostserve_abi(void) { return 5; }

/* targets[s][r] = sum over j of c[r][j] * sources[s][j], for all segments s; plus what is there with ACCUMULATE.

   Pointers of segment s: sources[s * columns + j] and targets[s * rows + r], lengths[s] bytes each, any alignment.
   `tables` and `matrices` belong to the rows * columns coefficients. Targets overlap neither each other nor a source.
   Not checked: anything. The path is one that ghostserve_gf256_supports; rows and columns are at least 1. */
EXPORT void ghostserve_gf256_combine(int path, int rows, int columns, const u8 *tables, const uint64_t *matrices,
                                     size_t segments, const u8 *const *sources, u8 *const *targets,
                                     const size_t *lengths, unsigned flags) {
    for (size_t s = 0; s < segments; s++) {
        /* More than four targets take several passes: over parts that stay in the cache. */
        const size_t block = rows > ROWS ? CACHED_BYTES : lengths[s];
        for (size_t begin = 0; begin < lengths[s]; begin += block) {
            const size_t end = lengths[s] - begin < block ? lengths[s] : begin + block;
            for (int first = 0; first < rows; first += ROWS) {
                const size_t skipped = (size_t)first * columns;
                const struct job job = {
                    .columns = columns,
                    .tables = tables + skipped * TABLE_BYTES,
                    .matrices = matrices + skipped,
                    .sources = sources + s * columns,
                    .targets = targets + s * rows + first,
                    .flags = first ? flags & ~(unsigned)(FIRST_ROW_XOR | POWERS) : flags,
                };
                range(path, &job, rows - first < ROWS ? rows - first : ROWS, begin, end);
            }
        }
    }
    if (flags & STREAM) fence();
}
