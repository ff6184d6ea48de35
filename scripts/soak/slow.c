/* A slow file system: every open, sync, rename and removal below SLOW_FOLDER takes 50 ms longer. Preloaded into ranks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void late(const char *path) {
  const char *folder = getenv("SLOW_FOLDER");
  if (folder && path && strncmp(path, folder, strlen(folder)) == 0) usleep(50000);
}

static mode_t mode_of(int flags, va_list more) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; }

#define OPEN(name)                                                                    \
  int name(const char *path, int flags, ...) {                                        \
    va_list more;                                                                     \
    va_start(more, flags);                                                            \
    mode_t mode = mode_of(flags, more);                                               \
    va_end(more);                                                                     \
    late(path);                                                                       \
    int (*real)(const char *, int, mode_t) = dlsym(RTLD_NEXT, #name);                 \
    return real(path, flags, mode);                                                   \
  }
OPEN(open)
OPEN(open64)

int fsync(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length > 0) {
    path[length] = 0;
    late(path);
  }
  int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
  return real(descriptor);
}

int rename(const char *from, const char *to) {
  late(from);
  int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
  return real(from, to);
}

int unlink(const char *path) {
  late(path);
  int (*real)(const char *) = dlsym(RTLD_NEXT, "unlink");
  return real(path);
}
