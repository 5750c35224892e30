/* Records what a process does to the files below one directory, so that crash.py can build what a disk may
   hold after a power loss. Preloaded (LD_PRELOAD) into the process; see kvrep/testing/crash.py.

   KVREP_TRACE       the file the events are appended to
   KVREP_TRACE_ROOT  only paths below this directory are recorded

   One lock is held around every wrapped call and its event, so that the events are in the order in which
   the calls took effect. Calls that fail are not recorded. Calls that the model does not know are recorded
   as such: the trace is then refused. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, CLOSE, WRITE, SYNC, RESIZE, RENAME, UNLINK, MKDIR, RMDIR, ALLOCATE, MARK, UNKNOWN };

#define FDS 65536
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char tracked[FDS];
static int trace_fd = -1;
static char root[PATH_MAX];
static size_t root_length;

struct __attribute__((packed)) head {
    uint8_t kind;
    int32_t fd;
    int64_t a, b;
    uint32_t first, second;
};

static void emit(const void *data, size_t length) {
    const char *at = data;
    while (length > 0) {
        long count = syscall(SYS_write, trace_fd, at, length);
        if (count <= 0) abort(); /* a trace with a hole would prove nothing */
        at += count;
        length -= (size_t)count;
    }
}

static void event(int kind, int fd, int64_t a, int64_t b, const void *first, size_t n, const char *second) {
    struct head head = {kind, fd, a, b, (uint32_t)n, second ? (uint32_t)strlen(second) : 0};
    emit(&head, sizeof head);
    emit(first, n);
    if (second) emit(second, head.second);
}

__attribute__((constructor)) static void start(void) {
    const char *file = getenv("KVREP_TRACE"), *folder = getenv("KVREP_TRACE_ROOT");
    if (!file || !folder) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) abort();
    trace_fd = fcntl(fd, F_DUPFD_CLOEXEC, 1000);
    if (trace_fd < 0) trace_fd = fd; else syscall(SYS_close, fd);
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
}

#define REAL(result, name, ...)                                       \
    static result (*real)(__VA_ARGS__);                               \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* The absolute form of a path; false when it is not below the root. */
static int below(int dirfd, const char *path, char *out) {
    if (trace_fd < 0 || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
    } else {
        char link[64], folder[PATH_MAX];
        if (dirfd == AT_FDCWD) {
            if (!getcwd(folder, sizeof folder)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            ssize_t n = readlink(link, folder, sizeof folder - 1);
            if (n < 0) return 0;
            folder[n] = 0;
        }
        size_t n = strlen(folder);
        if (n + strlen(path) + 2 > PATH_MAX) return 0;
        memcpy(out, folder, n);
        out[n] = '/';
        strcpy(out + n + 1, path);
    }
    return strncmp(out, root, root_length) == 0 && (out[root_length] == '/' || out[root_length] == 0);
}

static int known(int fd) { return fd >= 0 && fd < FDS && tracked[fd]; }

static int open_any(int dirfd, const char *path, int flags, mode_t mode) {
    REAL(int, openat, int, const char *, int, ...);
    char full[PATH_MAX];
    if (!below(dirfd, path, full)) return real(dirfd, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat info;
    int existed = fstatat(dirfd, path, &info, 0) == 0;
    int fd = real(dirfd, path, flags, mode);
    int error = errno;
    if (fd >= 0 && fd < FDS) {
        tracked[fd] = 1;
        event(OPEN, fd, flags, !existed, full, strlen(full), NULL);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE_OF(flags)                              \
    mode_t mode = 0;                                \
    if ((flags) & (O_CREAT | O_TMPFILE)) {          \
        va_list list;                               \
        va_start(list, flags);                      \
        mode = (mode_t)va_arg(list, int);           \
        va_end(list);                               \
    }

int open(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dir, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd) {
    REAL(int, close, int);
    if (!known(fd)) return real(fd);
    pthread_mutex_lock(&lock);
    tracked[fd] = 0;
    event(CLOSE, fd, 0, 0, "", 0, NULL);
    int result = real(fd);
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

/* What a write of `count` bytes put at `offset`, taken out of the caller's buffers. */
static void wrote(int fd, const struct iovec *parts, int n, ssize_t count, int64_t offset, int sync) {
    struct head head = {WRITE, fd, offset, sync, (uint32_t)count, 0};
    emit(&head, sizeof head);
    for (int i = 0; i < n && count > 0; i++) {
        size_t length = parts[i].iov_len < (size_t)count ? parts[i].iov_len : (size_t)count;
        emit(parts[i].iov_base, length);
        count -= (ssize_t)length;
    }
}

static int64_t place(int fd) {
    int flags = fcntl(fd, F_GETFL);
    struct stat info;
    if (flags >= 0 && flags & O_APPEND && fstat(fd, &info) == 0) return info.st_size;
    return lseek(fd, 0, SEEK_CUR);
}

#define RECORDED_WRITE(call, parts, n, offset, sync)             \
    pthread_mutex_lock(&lock);                                   \
    int64_t at = (offset);                                       \
    ssize_t count = (call);                                      \
    int error = errno;                                           \
    if (count > 0) wrote(fd, parts, n, count, at, sync);         \
    pthread_mutex_unlock(&lock);                                 \
    errno = error;                                               \
    return count

ssize_t write(int fd, const void *data, size_t length) {
    REAL(ssize_t, write, int, const void *, size_t);
    if (!known(fd)) return real(fd, data, length);
    struct iovec part = {(void *)data, length};
    RECORDED_WRITE(real(fd, data, length), &part, 1, place(fd), 0);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    if (!known(fd)) return real(fd, parts, n);
    RECORDED_WRITE(real(fd, parts, n), parts, n, place(fd), 0);
}

#define PWRITE(name)                                                              \
    ssize_t name(int fd, const void *data, size_t length, off_t offset) {         \
        REAL(ssize_t, name, int, const void *, size_t, off_t);                    \
        if (!known(fd)) return real(fd, data, length, offset);                    \
        struct iovec part = {(void *)data, length};                               \
        RECORDED_WRITE(real(fd, data, length, offset), &part, 1, offset, 0);      \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define PWRITEV(name)                                                             \
    ssize_t name(int fd, const struct iovec *parts, int n, off_t offset) {        \
        REAL(ssize_t, name, int, const struct iovec *, int, off_t);               \
        if (!known(fd)) return real(fd, parts, n, offset);                        \
        RECORDED_WRITE(real(fd, parts, n, offset), parts, n, offset, 0);          \
    }
PWRITEV(pwritev)
PWRITEV(pwritev64)

#define PWRITEV2(name)                                                            \
    ssize_t name(int fd, const struct iovec *parts, int n, off_t offset, int flags) { \
        REAL(ssize_t, name, int, const struct iovec *, int, off_t, int);          \
        if (!known(fd)) return real(fd, parts, n, offset, flags);                 \
        RECORDED_WRITE(real(fd, parts, n, offset, flags), parts, n, offset,       \
                       (flags & (RWF_DSYNC | RWF_SYNC)) != 0);                    \
    }
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

/* Calls on a descriptor that return 0 and are one event. */
#define ON_FD(call, kind, a, b)                                  \
    pthread_mutex_lock(&lock);                                   \
    int result = (call);                                         \
    int error = errno;                                           \
    if (result == 0) event(kind, fd, a, b, "", 0, NULL);         \
    pthread_mutex_unlock(&lock);                                 \
    errno = error;                                               \
    return result

int fsync(int fd) {
    REAL(int, fsync, int);
    if (!known(fd)) return real(fd);
    ON_FD(real(fd), SYNC, 0, 0);
}
int fdatasync(int fd) {
    REAL(int, fdatasync, int);
    if (!known(fd)) return real(fd);
    ON_FD(real(fd), SYNC, 1, 0);
}

#define FTRUNCATE(name)                                  \
    int name(int fd, off_t size) {                       \
        REAL(int, name, int, off_t);                     \
        if (!known(fd)) return real(fd, size);           \
        ON_FD(real(fd, size), RESIZE, size, 0);          \
    }
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)

#define POSIX_FALLOCATE(name)                                                  \
    int name(int fd, off_t offset, off_t length) {                             \
        REAL(int, name, int, off_t, off_t);                                    \
        if (!known(fd)) return real(fd, offset, length);                       \
        ON_FD(real(fd, offset, length), ALLOCATE, offset, length);             \
    }
POSIX_FALLOCATE(posix_fallocate)
POSIX_FALLOCATE(posix_fallocate64)

#define FALLOCATE(name)                                                        \
    int name(int fd, int mode, off_t offset, off_t length) {                   \
        REAL(int, name, int, int, off_t, off_t);                               \
        if (!known(fd)) return real(fd, mode, offset, length);                 \
        ON_FD(real(fd, mode, offset, length), mode ? UNKNOWN : ALLOCATE, offset, length); \
    }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)

/* Calls on paths. */
#define ON_PATH(call, kind, a, first, second)                               \
    pthread_mutex_lock(&lock);                                              \
    int result = (call);                                                    \
    int error = errno;                                                      \
    if (result == 0) event(kind, -1, a, 0, first, strlen(first), second);   \
    pthread_mutex_unlock(&lock);                                            \
    errno = error;                                                          \
    return result

#define TRUNCATE(name)                                   \
    int name(const char *path, off_t size) {             \
        REAL(int, name, const char *, off_t);            \
        char full[PATH_MAX];                             \
        if (!below(AT_FDCWD, path, full)) return real(path, size); \
        ON_PATH(real(path, size), RESIZE, size, full, NULL);       \
    }
TRUNCATE(truncate)
TRUNCATE(truncate64)

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    char old[PATH_MAX], new[PATH_MAX];
    int inside = below(from_dir, from, old), goes_in = below(to_dir, to, new);
    if (!inside && !goes_in) return real(from_dir, from, to_dir, to, flags);
    ON_PATH(real(from_dir, from, to_dir, to, flags), flags || !inside || !goes_in ? UNKNOWN : RENAME, 0, old, new);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return renameat2(from_dir, from, to_dir, to, 0);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int dir, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    char full[PATH_MAX];
    if (!below(dir, path, full)) return real(dir, path, flags);
    ON_PATH(real(dir, path, flags), flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, full, NULL);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    char full[PATH_MAX];
    if (!below(dir, path, full)) return real(dir, path, mode);
    ON_PATH(real(dir, path, mode), MKDIR, 0, full, NULL);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    char full[PATH_MAX];
    if (!below(to_dir, to, full)) return real(from_dir, from, to_dir, to, flags);
    ON_PATH(real(from_dir, from, to_dir, to, flags), UNKNOWN, 0, full, NULL);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

/* Called by the workload itself: a word on how far it has come, in order with everything else. */
void kvrep_trace_mark(const char *text) {
    if (trace_fd < 0) return;
    pthread_mutex_lock(&lock);
    event(MARK, -1, 0, 0, text, strlen(text), NULL);
    pthread_mutex_unlock(&lock);
}
