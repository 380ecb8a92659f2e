/* In front of libc, by LD_PRELOAD: fsync and fdatasync that fail or are slow, a wall clock that is elsewhere.
 *
 * COORDLIB_NEMESIS_SHIM names a file that is mapped and read at every call, so that whoever else maps it can change
 * what happens in the running process, and see how often it did. The layout is that of `_LAYOUT` in shim.py.
 * Only CLOCK_REALTIME is shifted; what measures durations is left alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t wall_shift_ns; /* added to the wall clock */
    int64_t sync_delay_ns; /* slept before every sync */
    int64_t sync_errno;    /* what every sync fails with; 0: it does not; -1: it says that it was done, and was not */
    int64_t wall_reads;    /* shifted readings so far */
    int64_t syncs_slowed;
    int64_t syncs_failed;
};

static struct control nothing;
static struct control *control = &nothing;

__attribute__((constructor)) static void map_control(void)
{
    const char *path = getenv("COORDLIB_NEMESIS_SHIM");
    if (path == NULL)
        return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at != MAP_FAILED)
        control = at;
}

static int sync_with(int fd, long call)
{
    int64_t delay = __atomic_load_n(&control->sync_delay_ns, __ATOMIC_SEQ_CST);
    if (delay > 0) {
        struct timespec pause = {delay / 1000000000, delay % 1000000000};
        __atomic_fetch_add(&control->syncs_slowed, 1, __ATOMIC_SEQ_CST);
        nanosleep(&pause, NULL);
    }
    int64_t error = __atomic_load_n(&control->sync_errno, __ATOMIC_SEQ_CST);
    if (error == -1)
        return 0;
    if (error != 0) {
        __atomic_fetch_add(&control->syncs_failed, 1, __ATOMIC_SEQ_CST);
        errno = (int)error;
        return -1;
    }
    return (int)syscall(call, fd);
}

int fsync(int fd) { return sync_with(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_with(fd, SYS_fdatasync); }

static void shift(struct timespec *at)
{
    int64_t by = __atomic_load_n(&control->wall_shift_ns, __ATOMIC_SEQ_CST);
    if (by == 0)
        return;
    int64_t whole = (int64_t)at->tv_sec * 1000000000 + at->tv_nsec + by;
    at->tv_sec = whole / 1000000000;
    at->tv_nsec = whole % 1000000000;
    __atomic_fetch_add(&control->wall_reads, 1, __ATOMIC_SEQ_CST);
}

int clock_gettime(clockid_t clock, struct timespec *at)
{
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL)
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real != NULL ? real(clock, at) : (int)syscall(SYS_clock_gettime, clock, at);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        shift(at);
    return result;
}

time_t time(time_t *out)
{
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (out != NULL)
        *out = at.tv_sec;
    return at.tv_sec;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone)
{
    struct timespec at;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &at);
    out->tv_sec = at.tv_sec;
    out->tv_usec = at.tv_nsec / 1000;
    return 0;
}
