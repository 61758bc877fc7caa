/* Preloaded into a process that asks for a fault (`fault_arm`) at its N-th change of a file below a folder.
   Changes are: write, truncate, open for writing, rename, unlink, mkdir and rmdir, through whatever library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, FULL = 100, REFUSED = 101, MOVED = 102, DELETED = 103 }; /* below 100: the number of a signal */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folder[PATH_MAX], victim[PATH_MAX];
static long at, seen;
static int how, log_file = -1;
static pid_t armed;

void fault_arm(const char *below, long number, int kind, const char *name, const char *log) {
    strncpy(folder, below, PATH_MAX - 1);
    strncpy(victim, name, PATH_MAX - 1);
    at = number, how = kind, seen = 0;
    log_file = *log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    armed = getpid();
}

static int remove_one(const char *path, const struct stat *s, int type, struct FTW *f) { return remove(path); }

/* Whether the change meets a fault: 0 no, 1 cut it in half and kill, -1 refuse it with errno set. */
static int met(const char *operation, const char *path) {
    if (armed != getpid() || !folder[0]) return 0;
    size_t length = strlen(folder);
    if (strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    long now = __sync_add_and_fetch(&seen, 1);
    if (log_file >= 0) dprintf(log_file, "%s %s\n", operation, path + length);
    if (how == REFUSED) {
        const char *name = strrchr(path, '/');
        if (name && !strcmp(name + 1, victim)) { errno = EACCES; return -1; }
        return 0;
    }
    if (how == FULL) {
        int frees = !strcmp(operation, "unlink") || !strcmp(operation, "rename") || !strcmp(operation, "truncate");
        if (now < at || frees) return 0;
        errno = ENOSPC;
        return -1;
    }
    if (now != at) return 0;
    if (how == MOVED || how == DELETED) {
        char run[PATH_MAX], away[PATH_MAX + 8];
        snprintf(run, sizeof run, "%s", path);
        char *end = strchr(run + length + 1, '/');
        if (end) *end = 0;
        snprintf(away, sizeof away, "%s.moved", folder);
        if (how == MOVED) REAL(rename)(run, away); else nftw(run, remove_one, 16, FTW_DEPTH | FTW_PHYS);
        return 0;
    }
    if (how == SIGKILL) return 1;
    if (how > 0) kill(getpid(), how);
    return 0;
}

static void dead(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static const char *of_file(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

static const char *whole(int at_folder, const char *name, char *path) {
    if (name[0] == '/') return name;
    char base[PATH_MAX];
    if (at_folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return name; }
    else of_file(at_folder, base);
    snprintf(path, PATH_MAX, "%s/%s", base, name);
    return path;
}

#define BY_NAME(operation, folder_number, name)                      \
    char buffer[PATH_MAX + NAME_MAX + 2];                            \
    int fault = met(operation, whole(folder_number, name, buffer));  \
    if (fault > 0) dead();                                           \
    if (fault < 0) return -1;

/* A write is cut in half before a kill, and on a full disk the first one that fails takes a half as well. */
#define BY_FILE(file, size, half)                                    \
    char buffer[PATH_MAX];                                           \
    int fault = armed == getpid() && folder[0] ? met("write", of_file(file, buffer)) : 0; \
    if (fault > 0) { if ((size) > 1) { half; } dead(); }             \
    if (fault < 0 && how == FULL && seen == at && (size) > 1) return half; \
    if (fault < 0) return -1;

ssize_t write(int f, const void *b, size_t n) { BY_FILE(f, n, REAL(write)(f, b, n / 2)) return REAL(write)(f, b, n); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) {
    BY_FILE(f, n, REAL(pwrite)(f, b, n / 2, o)) return REAL(pwrite)(f, b, n, o);
}
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) {
    BY_FILE(f, n, REAL(pwrite64)(f, b, n / 2, o)) return REAL(pwrite64)(f, b, n, o);
}
ssize_t writev(int f, const struct iovec *v, int n) {
    BY_FILE(f, v[0].iov_len, REAL(write)(f, v[0].iov_base, v[0].iov_len / 2)) return REAL(writev)(f, v, n);
}
ssize_t sendfile(int f, int in, off_t *o, size_t n) {
    BY_FILE(f, n, REAL(sendfile)(f, in, o, n / 2)) return REAL(sendfile)(f, in, o, n);
}
ssize_t sendfile64(int f, int in, off64_t *o, size_t n) {
    BY_FILE(f, n, REAL(sendfile64)(f, in, o, n / 2)) return REAL(sendfile64)(f, in, o, n);
}
int ftruncate(int f, off_t n) {
    char b[PATH_MAX]; int fault = met("truncate", of_file(f, b)); if (fault > 0) dead();
    return fault < 0 ? -1 : REAL(ftruncate)(f, n);
}
int ftruncate64(int f, off64_t n) {
    char b[PATH_MAX]; int fault = met("truncate", of_file(f, b)); if (fault > 0) dead();
    return fault < 0 ? -1 : REAL(ftruncate64)(f, n);
}
int rename(const char *a, const char *b) { BY_NAME("rename", AT_FDCWD, b) return REAL(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) { BY_NAME("rename", e, b) return REAL(renameat)(d, a, e, b); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    BY_NAME("rename", e, b) return REAL(renameat2)(d, a, e, b, f);
}
int unlink(const char *a) { BY_NAME("unlink", AT_FDCWD, a) return REAL(unlink)(a); }
int unlinkat(int d, const char *a, int f) { BY_NAME("unlink", d, a) return REAL(unlinkat)(d, a, f); }
int rmdir(const char *a) { BY_NAME("unlink", AT_FDCWD, a) return REAL(rmdir)(a); }
int mkdir(const char *a, mode_t m) { BY_NAME("mkdir", AT_FDCWD, a) return REAL(mkdir)(a, m); }
int mkdirat(int d, const char *a, mode_t m) { BY_NAME("mkdir", d, a) return REAL(mkdirat)(d, a, m); }

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY)
#define MODE va_list l; va_start(l, flags); mode_t mode = va_arg(l, mode_t); va_end(l);
int open(const char *a, int flags, ...) {
    MODE if (WRITES(flags)) { BY_NAME("open", AT_FDCWD, a) } return REAL(open)(a, flags, mode);
}
int open64(const char *a, int flags, ...) {
    MODE if (WRITES(flags)) { BY_NAME("open", AT_FDCWD, a) } return REAL(open64)(a, flags, mode);
}
int openat(int d, const char *a, int flags, ...) {
    MODE if (WRITES(flags)) { BY_NAME("open", d, a) } return REAL(openat)(d, a, flags, mode);
}
int openat64(int d, const char *a, int flags, ...) {
    MODE if (WRITES(flags)) { BY_NAME("open", d, a) } return REAL(openat64)(d, a, flags, mode);
}
static int stream(const char *a, const char *m) {
    char path[PATH_MAX + NAME_MAX + 2];
    if (!strpbrk(m, "wa+")) return 0;
    int fault = met("open", whole(AT_FDCWD, a, path));
    if (fault > 0) dead();
    return fault;
}
FILE *fopen(const char *a, const char *m) { return stream(a, m) < 0 ? NULL : REAL(fopen)(a, m); }
FILE *fopen64(const char *a, const char *m) { return stream(a, m) < 0 ? NULL : REAL(fopen64)(a, m); }
