/* Preloaded into a process under test: reads of chosen files go wrong at chosen places, as on a failing disk or server.

   FAULTY_READS="SUFFIX:KIND:OFFSET:ARGUMENT;..."  concerns files whose path ends so.
       errno   a read that touches byte OFFSET fails with errno ARGUMENT
       short   every read gives at most ARGUMENT bytes
       end     a read at OFFSET or behind it gives nothing, as at the end of a file
       slow    every read takes ARGUMENT ms longer
       hang    a read that touches byte OFFSET does not return
       direct  reads past the page cache fail with EINVAL from byte OFFSET on
       open    opening does not return */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* What happens to a read of `length` bytes at `offset` of `path`: 0 and perhaps a smaller length, or -1 with errno. */
static int strike(const char *path, int flags, off_t offset, size_t *length, int opening) {
    const char *all = getenv("FAULTY_READS");
    char copy[1024], *rest = NULL;
    if (all == NULL) return 0;
    snprintf(copy, sizeof copy, "%s", all);
    for (char *one = strtok_r(copy, ";", &rest); one != NULL; one = strtok_r(NULL, ";", &rest)) {
        char suffix[256], kind[16];
        long long at, argument;
        if (sscanf(one, "%255[^:]:%15[^:]:%lld:%lld", suffix, kind, &at, &argument) != 4) abort();
        if (!ends_with(path, suffix)) continue;
        if (opening) {
            while (strcmp(kind, "open") == 0) pause();
            continue;
        }
        int touches = offset <= at && at < offset + (off_t)*length;
        if (strcmp(kind, "errno") == 0 && touches) return errno = (int)argument, -1;
        if (strcmp(kind, "direct") == 0 && (flags & O_DIRECT) && offset + (off_t)*length > at) return errno = EINVAL, -1;
        if (strcmp(kind, "short") == 0 && *length > (size_t)argument) *length = (size_t)argument;
        if (strcmp(kind, "end") == 0 && offset + (off_t)*length > at) *length = offset < at ? (size_t)(at - offset) : 0;
        if (strcmp(kind, "slow") == 0) usleep((useconds_t)argument * 1000);
        while (strcmp(kind, "hang") == 0 && touches) pause();
    }
    return 0;
}

static ssize_t faulty(int fd, const struct iovec *vector, int count, off_t offset) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n < 0 ? 0 : n] = 0;
    size_t length = 0;
    for (int i = 0; i < count; i++) length += vector[i].iov_len;
    if (strike(path, fcntl(fd, F_GETFL), offset, &length, 0) < 0) return -1;
    ssize_t (*real)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, "preadv64");
    ssize_t got = real(fd, vector, count, offset);
    if (got <= (ssize_t)length) return got;
    size_t left = length;
    for (int i = 0; i < count; i++) { /* what it did not give must not be there */
        size_t keep = left < vector[i].iov_len ? left : vector[i].iov_len;
        memset((char *)vector[i].iov_base + keep, 0xEE, vector[i].iov_len - keep);
        left -= keep;
    }
    return (ssize_t)length;
}

#define ONE(NAME)                                                                                                      \
    ssize_t NAME(int fd, void *to, size_t length, off_t offset) {                                                      \
        struct iovec one = {to, length};                                                                               \
        return faulty(fd, &one, 1, offset);                                                                            \
    }
#define MANY(NAME)                                                                                                     \
    ssize_t NAME(int fd, const struct iovec *vector, int count, off_t offset) { return faulty(fd, vector, count, offset); }
#define FLAGGED(NAME)                                                                                                  \
    ssize_t NAME(int fd, const struct iovec *vector, int count, off_t offset, int flags) {                             \
        (void)flags;                                                                                                   \
        return faulty(fd, vector, count, offset);                                                                      \
    }
ONE(pread)
ONE(pread64)
MANY(preadv)
MANY(preadv64)
FLAGGED(preadv2)
FLAGGED(preadv64v2)

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    size_t none = 0;
    strike(path, flags, 0, &none, 1);
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open64");
    return real(path, flags, mode);
}
