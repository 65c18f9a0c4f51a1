/* A disk that fails, for one process and its children: preloaded, it counts the calls of the C library that change files
 * under one folder, and from a given one on ends the process group, or refuses. So SQLite, Rust and C++ are covered as
 * Python is; what C's stdio writes, and what is written through mapped memory, is not seen.
 *
 * FAULTY_ROOT: the folder, resolved. FAULTY_STATE: a file of one struct state, shared by all processes. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode {
    COUNT,
    KILL,     /* before the call */
    TORN,     /* within it: half of the bytes are written */
    FULL,     /* no data and no new names */
    NO_DATA,  /* new names are made, and stay empty */
    READ_ONLY, /* nothing changes */
    GLITCH     /* no room for this one call, and again for all after it */
};
/* What needs no room, what needs a name, what needs blocks, what changes nothing. */
enum kind { CHANGE, CREATE, DATA, SYNC };
enum { HALF = -1 }; /* beside the system's error numbers */

struct state {
    _Atomic uint64_t count; /* of calls so far */
    uint64_t at;            /* the first that fails, from 1 */
    uint64_t mode;
};

static struct state *state;
static char root[PATH_MAX];
static size_t root_length;

#define REAL(name, type, ...)                                          \
    static type (*real)(__VA_ARGS__);                                  \
    if (real == NULL) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

__attribute__((constructor)) static void begin(void) {
    REAL("open", int, const char *, int, ...);
    const char *file = getenv("FAULTY_STATE"), *given = getenv("FAULTY_ROOT");
    if (file == NULL || given == NULL || strlen(given) >= sizeof root) return;
    int handle = real(file, O_RDWR);
    if (handle < 0) return;
    void *mapped = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    close(handle);
    if (mapped == MAP_FAILED) return;
    root_length = strlen(strcpy(root, given));
    state = mapped;
}

static int under_root(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == '\0');
}

static int handle_inside(int handle) {
    if (state == NULL) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = '\0';
    return under_root(path);
}

static int path_inside(int folder, const char *path) {
    if (state == NULL || path == NULL) return 0;
    if (path[0] == '/') return under_root(path);
    if (folder != AT_FDCWD) return handle_inside(folder);
    char here[PATH_MAX];
    return getcwd(here, sizeof here) != NULL && under_root(here);
}

/* 0: go on. HALF: write half; a second half is refused, or the process ends. Else the error. */
static int event(enum kind kind) {
    int before = errno;
    uint64_t number = atomic_fetch_add(&state->count, 1) + 1;
    if (state->mode == COUNT || number < state->at) return 0;
    switch ((enum mode)state->mode) {
    case TORN:
        if (kind == DATA) return HALF;
        /* fall through */
    case KILL:
        kill(0, SIGKILL);
        for (;;) pause();
    case FULL:
    case NO_DATA:
        if (kind == DATA) return number == state->at ? HALF : ENOSPC;
        return kind == CREATE && state->mode == FULL ? ENOSPC : 0;
    case GLITCH: return number == state->at && (kind == DATA || kind == CREATE) ? ENOSPC : 0;
    case READ_ONLY: return kind == SYNC ? 0 : EROFS;
    default: errno = before; return 0;
    }
}

static void end_if_torn(void) {
    if (state->mode == TORN) {
        kill(0, SIGKILL);
        for (;;) pause();
    }
}

#define REFUSE(inside, kind)                   \
    do {                                       \
        int wrong = (inside) ? event(kind) : 0; \
        if (wrong == HALF) end_if_torn();      \
        if (wrong > 0) {                       \
            errno = wrong;                     \
            return -1;                         \
        }                                      \
    } while (0)

/* --- data --- */

#define WRITES(name, size, inside, parameters, call, half)                 \
    ssize_t name parameters {                                              \
        REAL(#name, ssize_t, TYPES_##name);                                \
        int wrong = (inside) ? event(DATA) : 0;                            \
        if (wrong == 0) return real call;                                  \
        if (wrong == HALF) {                                               \
            ssize_t done = (size) > 1 ? real half : 0;                     \
            end_if_torn();                                                 \
            if (done > 0) return done;                                     \
            wrong = ENOSPC;                                                \
        }                                                                  \
        errno = wrong;                                                     \
        return -1;                                                         \
    }

#define TYPES_write int, const void *, size_t
#define TYPES_pwrite int, const void *, size_t, off_t
#define TYPES_pwrite64 int, const void *, size_t, off64_t
#define TYPES_writev int, const struct iovec *, int
#define TYPES_sendfile int, int, off_t *, size_t
#define TYPES_sendfile64 int, int, off64_t *, size_t
#define TYPES_copy_file_range int, off64_t *, int, off64_t *, size_t, unsigned

WRITES(write, n, handle_inside(to), (int to, const void *data, size_t n), (to, data, n), (to, data, n / 2))
WRITES(pwrite, n, handle_inside(to), (int to, const void *data, size_t n, off_t at), (to, data, n, at), (to, data, n / 2, at))
WRITES(pwrite64, n, handle_inside(to), (int to, const void *data, size_t n, off64_t at), (to, data, n, at), (to, data, n / 2, at))
WRITES(writev, n, handle_inside(to), (int to, const struct iovec *parts, int n), (to, parts, n), (to, parts, n / 2))
WRITES(sendfile, n, handle_inside(to), (int to, int from, off_t *at, size_t n), (to, from, at, n), (to, from, at, n / 2))
WRITES(sendfile64, n, handle_inside(to), (int to, int from, off64_t *at, size_t n), (to, from, at, n), (to, from, at, n / 2))
WRITES(copy_file_range, n, handle_inside(to), (int from, off64_t *at, int to, off64_t *place, size_t n, unsigned flags),
       (from, at, to, place, n, flags), (from, at, to, place, n / 2, flags))

#define TRUNCATES(name, offset)                                                                        \
    int name(int handle, offset length) {                                                              \
        REAL(#name, int, int, offset);                                                                 \
        struct stat now;                                                                               \
        int inside = handle_inside(handle);                                                            \
        int grows = inside && fstat(handle, &now) == 0 && (intmax_t)length > (intmax_t)now.st_size;    \
        REFUSE(inside, grows ? CREATE : CHANGE);                                                       \
        return real(handle, length);                                                                   \
    }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

int fsync(int handle) {
    REAL("fsync", int, int);
    REFUSE(handle_inside(handle), SYNC);
    return real(handle);
}

int fdatasync(int handle) {
    REAL("fdatasync", int, int);
    REFUSE(handle_inside(handle), SYNC);
    return real(handle);
}

/* --- names --- */

static int may_open(int folder, const char *path, int flags) {
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) == 0 || !path_inside(folder, path)) return 0;
    int before = errno;
    int there = faccessat(folder, path, F_OK, 0) == 0;
    errno = before;
    if (!there && (flags & O_CREAT) == 0) return 0;
    REFUSE(1, there ? CHANGE : CREATE);
    return 0;
}

#define OPENS(name)                                        \
    int name(const char *path, int flags, ...) {           \
        REAL(#name, int, const char *, int, ...);          \
        va_list rest;                                      \
        va_start(rest, flags);                             \
        mode_t rights = va_arg(rest, mode_t);              \
        va_end(rest);                                      \
        if (may_open(AT_FDCWD, path, flags) < 0) return -1; \
        return real(path, flags, rights);                  \
    }
OPENS(open)
OPENS(open64)

#define OPENS_AT(name)                                       \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(#name, int, int, const char *, int, ...);       \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t rights = va_arg(rest, mode_t);                \
        va_end(rest);                                        \
        if (may_open(folder, path, flags) < 0) return -1;    \
        return real(folder, path, flags, rights);            \
    }
OPENS_AT(openat)
OPENS_AT(openat64)

#define OPENS_STREAM(name)                                                                            \
    FILE *name(const char *path, const char *how) {                                                   \
        REAL(#name, FILE *, const char *, const char *);                                              \
        int flags = how[0] == 'r' ? (strchr(how, '+') ? O_RDWR : O_RDONLY) : O_WRONLY | O_CREAT;      \
        return may_open(AT_FDCWD, path, flags) < 0 ? NULL : real(path, how);                          \
    }
OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)

int mkdir(const char *path, mode_t rights) {
    REAL("mkdir", int, const char *, mode_t);
    REFUSE(path_inside(AT_FDCWD, path) && access(path, F_OK) != 0, CREATE);
    return real(path, rights);
}

int mkdirat(int folder, const char *path, mode_t rights) {
    REAL("mkdirat", int, int, const char *, mode_t);
    REFUSE(path_inside(folder, path) && faccessat(folder, path, F_OK, 0) != 0, CREATE);
    return real(folder, path, rights);
}

int rename(const char *from, const char *to) {
    REAL("rename", int, const char *, const char *);
    REFUSE(path_inside(AT_FDCWD, to), CHANGE);
    return real(from, to);
}

int renameat(int folder, const char *from, int other, const char *to) {
    REAL("renameat", int, int, const char *, int, const char *);
    REFUSE(path_inside(other, to), CHANGE);
    return real(folder, from, other, to);
}

int link(const char *from, const char *to) {
    REAL("link", int, const char *, const char *);
    REFUSE(path_inside(AT_FDCWD, to), CREATE);
    return real(from, to);
}

int symlink(const char *from, const char *to) {
    REAL("symlink", int, const char *, const char *);
    REFUSE(path_inside(AT_FDCWD, to), CREATE);
    return real(from, to);
}

int unlink(const char *path) {
    REAL("unlink", int, const char *);
    REFUSE(path_inside(AT_FDCWD, path), CHANGE);
    return real(path);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL("unlinkat", int, int, const char *, int);
    REFUSE(path_inside(folder, path), CHANGE);
    return real(folder, path, flags);
}

int rmdir(const char *path) {
    REAL("rmdir", int, const char *);
    REFUSE(path_inside(AT_FDCWD, path), CHANGE);
    return real(path);
}

int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    REAL("utimensat", int, int, const char *, const struct timespec *, int);
    const char *volatile given = path; /* declared never to be NULL, and NULL for futimens */
    REFUSE(given == NULL ? handle_inside(folder) : path_inside(folder, given), CHANGE);
    return real(folder, given, times, flags);
}

int chmod(const char *path, mode_t rights) {
    REAL("chmod", int, const char *, mode_t);
    REFUSE(path_inside(AT_FDCWD, path), CHANGE);
    return real(path, rights);
}
