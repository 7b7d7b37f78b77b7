/* Collectives among the processes of one machine, over shared memory, that can be abandoned.

   Every operation is a sequence of rounds. In a round each rank puts bytes into one of its two slots, announces the
   round's number in its lane, waits until every lane has reached that number, and reads what it needs from the slots.
   Two slots are enough: a rank that writes round k + 2 has seen every lane at k + 1, and a lane shows k + 1 only after
   its rank has read all it needs of round k.

   Messages from one rank to another go by a channel of their own, one piece at a time: the sender numbers what it put in,
   the receiver what it took out. Of a message that is no longer than a slot the sender waits for nobody.

   A wait ends when the number is there, when the abort word is set, when the peer's process has ended, or at the
   deadline. It spins for a moment and then sleeps on the peer's lane (futex), so that ranks that wait leave the
   processor to others; a sleeper looks around every two milliseconds.

   Sums go over the ranks in order, in float for the half types, and round once: all ranks get the same bits, today
   and after a recovery. No allocation, no threads, no CPython. Linux only. */

#if defined(__linux__)
#define _GNU_SOURCE
#include <linux/futex.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

int ghostserve_gf256_supports(int path);

#define EXPORT __attribute__((visibility("default")))
#define LINE 64
#define RANKS_MAX 64
#define SCATTER_BYTES (64 << 10) /* shorter sums are made by every rank for itself */
#define SLICE_NS 2000000 /* a sleeper looks at the abort word that often */

enum status { DONE = 0, ABORTED = 1, TIMED_OUT = 2, REFUSED = 3, PEER_GONE = 4 };
enum dtype { F32 = 0, F64 = 1, F16 = 2, BF16 = 3, I8 = 4, U8 = 5, I16 = 6, I32 = 7, I64 = 8 };

struct lane {
    uint32_t round;    /* the last one that this rank announced */
    uint32_t sleepers; /* on `round` */
    uint32_t abort;    /* lane 0: not zero once the group is given up */
} __attribute__((aligned(LINE)));

/* From one rank to another: the pieces that were put in, and those that were taken out again. */
struct channel {
    struct lane sent, taken;
};

/* What a rank lets others see of it, for whoever judges which rank holds the others up. Its own line of shared memory. */
struct progress {
    uint64_t met;       /* rounds announced since the group was formed; the same on all ranks that are equally far */
    uint64_t waited_ns; /* spent waiting for peers, in all */
    uint64_t waiting;   /* 1 while it waits for a peer */
};

/* One rank's view of its group; lives in the caller's memory and is used by one thread at a time. */
struct group {
    struct lane *lanes;        /* [ranks], shared */
    uint8_t *slots;            /* [ranks][2][slot_bytes], shared */
    struct channel *channels;  /* [ranks][ranks], from and to, shared */
    uint8_t *pieces;           /* [ranks][ranks][slot_bytes], shared */
    struct progress *progress; /* shared */
    const int32_t *pidfds;     /* [ranks]: readable once that rank's process has ended; negative: not watched */
    uint64_t slot_bytes;       /* a multiple of LINE */
    uint64_t timeout_ns;
    uint32_t rank, ranks, round, spins;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static long futex(const uint32_t *word, int operation, uint32_t value, const struct timespec *timeout) {
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static int given_up(const struct group *g) { return __atomic_load_n(&g->lanes[0].abort, __ATOMIC_ACQUIRE) != 0; }

static int has_ended(const struct group *g, uint32_t rank) {
    struct pollfd fd = {.fd = g->pidfds[rank], .events = POLLIN};
    return fd.fd >= 0 && poll(&fd, 1, 0) > 0;
}

static int reached(const struct lane *lane, uint32_t round, uint32_t *seen) {
    *seen = __atomic_load_n(&lane->round, __ATOMIC_ACQUIRE);
    return (int32_t)(*seen - round) >= 0;
}

static void announce(struct lane *mine, uint32_t number) {
    __atomic_store_n(&mine->round, number, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&mine->sleepers, __ATOMIC_SEQ_CST)) futex(&mine->round, FUTEX_WAKE, INT32_MAX, NULL);
}

/* Until `lane`, which `rank` writes, has reached `number`. */
static int sleep_on(struct group *g, struct lane *lane, uint32_t number, uint32_t rank, uint64_t deadline) {
    uint32_t seen;
    int status = DONE;
    __atomic_add_fetch(&lane->sleepers, 1, __ATOMIC_SEQ_CST);
    while (!reached(lane, number, &seen)) {
        if (given_up(g)) {
            status = ABORTED;
            break;
        }
        if (has_ended(g, rank)) {
            status = reached(lane, number, &seen) ? DONE : PEER_GONE; /* it may have announced just before */
            break;
        }
        const uint64_t now = now_ns();
        if (now >= deadline) {
            status = TIMED_OUT;
            break;
        }
        const uint64_t left = deadline - now < SLICE_NS ? deadline - now : SLICE_NS;
        const struct timespec slice = {.tv_sec = 0, .tv_nsec = (long)left};
        futex(&lane->round, FUTEX_WAIT, seen, &slice);
    }
    __atomic_sub_fetch(&lane->sleepers, 1, __ATOMIC_SEQ_CST);
    return status;
}

static int wait_for(struct group *g, struct lane *lane, uint32_t number, uint32_t rank, uint64_t deadline) {
    uint32_t seen, spins = 0;
    while (!reached(lane, number, &seen)) {
        if (spins++ < g->spins) {
            relax();
            continue;
        }
        const int status = sleep_on(g, lane, number, rank, deadline);
        if (status != DONE) return status;
    }
    return DONE;
}

/* Announce this round and wait for everybody's. */
static int meet(struct group *g) {
    struct progress *seen = g->progress;
    const uint64_t began = now_ns();
    __atomic_store_n(&seen->met, seen->met + 1, __ATOMIC_RELAXED);
    announce(&g->lanes[g->rank], ++g->round);
    __atomic_store_n(&seen->waiting, 1, __ATOMIC_RELAXED);
    int status = DONE; /* also when somebody has left since: what this round is about is all there */
    for (uint32_t r = 0; status == DONE && r < g->ranks; r++)
        status = wait_for(g, &g->lanes[r], g->round, r, began + g->timeout_ns);
    __atomic_store_n(&seen->waiting, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&seen->waited_ns, seen->waited_ns + (now_ns() - began), __ATOMIC_RELAXED);
    return status;
}

/* Wait for one peer alone. That is no round: how far the group is does not change. */
static int wait_alone(struct group *g, struct lane *lane, uint32_t number, uint32_t rank) {
    struct progress *seen = g->progress;
    const uint64_t began = now_ns();
    __atomic_store_n(&seen->waiting, 1, __ATOMIC_RELAXED);
    const int status = wait_for(g, lane, number, rank, began + g->timeout_ns);
    __atomic_store_n(&seen->waiting, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&seen->waited_ns, seen->waited_ns + (now_ns() - began), __ATOMIC_RELAXED);
    return status;
}

static uint8_t *slot(const struct group *g, uint32_t rank, uint32_t round) {
    return g->slots + ((size_t)rank * 2 + (round & 1)) * g->slot_bytes;
}

/* ---- sums ----------------------------------------------------------------------------------------------------------- */

static float of_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* a quiet NaN stays one */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Elements [0, count) of all ranks' slots, added in the order of the ranks into `out`. Half types go by way of float. */
#define ADD(NAME, ATTRIBUTES, TYPE)                                                                                    \
    ATTRIBUTES static void NAME(TYPE *out, const uint8_t *const *sources, uint32_t ranks, size_t count) {              \
        const TYPE *first = (const TYPE *)sources[0];                                                                  \
        if (ranks == 1) {                                                                                              \
            memmove(out, first, count * sizeof(TYPE));                                                                 \
            return;                                                                                                    \
        }                                                                                                              \
        const TYPE *second = (const TYPE *)sources[1];                                                                 \
        for (size_t i = 0; i < count; i++) out[i] = (TYPE)(first[i] + second[i]);                                      \
        for (uint32_t r = 2; r < ranks; r++) {                                                                         \
            const TYPE *next = (const TYPE *)sources[r];                                                               \
            for (size_t i = 0; i < count; i++) out[i] = (TYPE)(out[i] + next[i]);                                      \
        }                                                                                                              \
    }

#define ADD_HALF(NAME, ATTRIBUTES, TYPE, TO_FLOAT, FROM_FLOAT)                                                         \
    ATTRIBUTES static void NAME(TYPE *out, const uint8_t *const *sources, uint32_t ranks, size_t count) {              \
        enum { BLOCK = 512 };                                                                                          \
        for (size_t at = 0; at < count; at += BLOCK) {                                                                 \
            const size_t n = count - at < BLOCK ? count - at : BLOCK;                                                  \
            float sum[BLOCK];                                                                                          \
            const TYPE *first = (const TYPE *)sources[0] + at;                                                         \
            for (size_t i = 0; i < n; i++) sum[i] = TO_FLOAT(first[i]);                                                \
            for (uint32_t r = 1; r < ranks; r++) {                                                                     \
                const TYPE *next = (const TYPE *)sources[r] + at;                                                      \
                for (size_t i = 0; i < n; i++) sum[i] += TO_FLOAT(next[i]);                                            \
            }                                                                                                          \
            for (size_t i = 0; i < n; i++) out[at + i] = FROM_FLOAT(sum[i]);                                           \
        }                                                                                                              \
    }

#define PLAIN(x) ((float)(x))
#define TO_F16(x) ((_Float16)(x))

#define ADDS(SUFFIX, ATTRIBUTES)                                                                                       \
    ADD(add_f32##SUFFIX, ATTRIBUTES, float)                                                                            \
    ADD(add_f64##SUFFIX, ATTRIBUTES, double)                                                                           \
    ADD(add_u8##SUFFIX, ATTRIBUTES, uint8_t)                                                                           \
    ADD(add_u16##SUFFIX, ATTRIBUTES, uint16_t)                                                                         \
    ADD(add_u32##SUFFIX, ATTRIBUTES, uint32_t)                                                                         \
    ADD(add_u64##SUFFIX, ATTRIBUTES, uint64_t)                                                                         \
    ADD_HALF(add_f16##SUFFIX, ATTRIBUTES, _Float16, PLAIN, TO_F16)                                                     \
    ADD_HALF(add_bf16##SUFFIX, ATTRIBUTES, uint16_t, of_bf16, to_bf16)                                                 \
    ATTRIBUTES static int add##SUFFIX(int dtype, void *out, const uint8_t *const *sources, uint32_t ranks, size_t n) { \
        switch (dtype) {                                                                                               \
        case F32: add_f32##SUFFIX(out, sources, ranks, n); break;                                                      \
        case F64: add_f64##SUFFIX(out, sources, ranks, n); break;                                                      \
        case F16: add_f16##SUFFIX(out, sources, ranks, n); break;                                                      \
        case BF16: add_bf16##SUFFIX(out, sources, ranks, n); break;                                                    \
        case I8:                                                                                                       \
        case U8: add_u8##SUFFIX(out, sources, ranks, n); break; /* two's complement: signs do not matter */            \
        case I16: add_u16##SUFFIX(out, sources, ranks, n); break;                                                      \
        case I32: add_u32##SUFFIX(out, sources, ranks, n); break;                                                      \
        case I64: add_u64##SUFFIX(out, sources, ranks, n); break;                                                      \
        default: return REFUSED;                                                                                       \
        }                                                                                                              \
        return DONE;                                                                                                   \
    }

ADDS(_plain, )
#if defined(__x86_64__)
ADDS(_avx2, __attribute__((target("avx2,f16c"))))
#endif

#if defined(__x86_64__)
static int has_f16c(void) {
    uint32_t a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

static size_t element_bytes(int dtype) {
    static const uint8_t bytes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8};
    return dtype >= 0 && dtype < (int)sizeof(bytes) ? bytes[dtype] : 0;
}

static int add(int dtype, void *out, const uint8_t *const *sources, uint32_t ranks, size_t count) {
#if defined(__x86_64__)
    static int wide = -1; /* the same for all processes of a machine */
    if (wide < 0) wide = ghostserve_gf256_supports(1) && has_f16c();
    if (wide) return add_avx2(dtype, out, sources, ranks, count);
#endif
    return add_plain(dtype, out, sources, ranks, count);
}

/* ---- operations: on an error the buffers hold nothing of worth, and the group is used no more ---------------------------- */

static int exchange_sum(struct group *g, uint8_t *buffer, size_t bytes, int dtype, size_t element) {
    const uint8_t *sources[RANKS_MAX];
    memcpy(slot(g, g->rank, g->round + 1), buffer, bytes);
    int status = meet(g);
    if (status != DONE) return status;
    for (uint32_t r = 0; r < g->ranks; r++) sources[r] = slot(g, r, g->round);
    return add(dtype, buffer, sources, g->ranks, bytes / element);
}

/* Long ones: every rank adds its share of the elements, then all collect the shares. */
static int scatter_sum(struct group *g, uint8_t *buffer, size_t bytes, int dtype, size_t element) {
    const uint8_t *sources[RANKS_MAX];
    const size_t count = bytes / element, share = ((count + g->ranks - 1) / g->ranks + LINE - 1) / LINE * LINE * element;
    const size_t from = share * g->rank < bytes ? share * g->rank : bytes;
    const size_t mine = bytes - from < share ? bytes - from : share;
    memcpy(slot(g, g->rank, g->round + 1), buffer, bytes);
    int status = meet(g);
    if (status != DONE) return status;
    for (uint32_t r = 0; r < g->ranks; r++) sources[r] = slot(g, r, g->round) + from;
    status = add(dtype, slot(g, g->rank, g->round + 1), sources, g->ranks, mine / element);
    if (status != DONE) return status;
    status = meet(g);
    if (status != DONE) return status;
    for (uint32_t r = 0; r < g->ranks; r++) {
        const size_t at = share * r < bytes ? share * r : bytes;
        memcpy(buffer + at, slot(g, r, g->round), bytes - at < share ? bytes - at : share);
    }
    return DONE;
}

/* In place, `count` elements. */
EXPORT int ghostserve_all_reduce(struct group *g, void *buffer, size_t count, int dtype) {
    const size_t element = element_bytes(dtype);
    if (!element) return REFUSED;
    const size_t total = count * element, step = g->slot_bytes;
    for (size_t at = 0; at < total; at += step) {
        const size_t bytes = total - at < step ? total - at : step;
        uint8_t *part = (uint8_t *)buffer + at;
        const int status = bytes < SCATTER_BYTES ? exchange_sum(g, part, bytes, dtype, element)
                                                 : scatter_sum(g, part, bytes, dtype, element);
        if (status != DONE) return status;
    }
    return DONE;
}

/* Every rank's `bytes` bytes, one after the other in the order of the ranks, into `out`; NULL where they are not wanted. */
EXPORT int ghostserve_all_gather(struct group *g, const void *in, void *out, size_t bytes) {
    for (size_t at = 0; at < bytes; at += g->slot_bytes) {
        const size_t part = bytes - at < g->slot_bytes ? bytes - at : g->slot_bytes;
        memcpy(slot(g, g->rank, g->round + 1), (const uint8_t *)in + at, part);
        const int status = meet(g);
        if (status != DONE) return status;
        for (uint32_t r = 0; out && r < g->ranks; r++)
            memcpy((uint8_t *)out + (size_t)r * bytes + at, slot(g, r, g->round), part);
    }
    return DONE;
}

/* `bytes` bytes of rank `source` to all. */
EXPORT int ghostserve_broadcast(struct group *g, void *buffer, size_t bytes, uint32_t source) {
    for (size_t at = 0; at < bytes; at += g->slot_bytes) {
        const size_t part = bytes - at < g->slot_bytes ? bytes - at : g->slot_bytes;
        if (g->rank == source) memcpy(slot(g, source, g->round + 1), (uint8_t *)buffer + at, part);
        const int status = meet(g);
        if (status != DONE) return status;
        if (g->rank != source) memcpy((uint8_t *)buffer + at, slot(g, source, g->round), part);
    }
    return DONE;
}

/* `bytes` bytes to rank `to`, which asks for as many. Returns when the last piece was put in, not when it was taken out. */
EXPORT int ghostserve_send(struct group *g, const void *buffer, size_t bytes, uint32_t to) {
    const size_t which = (size_t)g->rank * g->ranks + to;
    struct channel *c = &g->channels[which];
    for (size_t at = 0; at < bytes; at += g->slot_bytes) {
        const size_t part = bytes - at < g->slot_bytes ? bytes - at : g->slot_bytes;
        const int status = wait_alone(g, &c->taken, c->sent.round, to); /* only we write `sent` */
        if (status != DONE) return status;
        memcpy(g->pieces + which * g->slot_bytes, (const uint8_t *)buffer + at, part);
        announce(&c->sent, c->sent.round + 1);
    }
    return DONE;
}

/* `bytes` bytes from rank `from`. */
EXPORT int ghostserve_recv(struct group *g, void *buffer, size_t bytes, uint32_t from) {
    const size_t which = (size_t)from * g->ranks + g->rank;
    struct channel *c = &g->channels[which];
    for (size_t at = 0; at < bytes; at += g->slot_bytes) {
        const size_t part = bytes - at < g->slot_bytes ? bytes - at : g->slot_bytes;
        const int status = wait_alone(g, &c->sent, c->taken.round + 1, from); /* only we write `taken` */
        if (status != DONE) return status;
        memcpy((uint8_t *)buffer + at, g->pieces + which * g->slot_bytes, part);
        announce(&c->taken, c->taken.round + 1);
    }
    return DONE;
}

/* Everybody of this group leaves what it waits for, now and from now on. */
EXPORT void ghostserve_abort(struct group *g) { __atomic_store_n(&g->lanes[0].abort, 1, __ATOMIC_RELEASE); }

#endif
