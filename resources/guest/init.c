/*
 * The init of the Linux test guest: it keeps the NVMe disks busy, checks everything that it reads, and says so on the
 * console, so that whoever moves the guest can see that nothing was lost.
 *
 * Two tasks, pinned to different CPUs (so to different NVMe queues):
 *
 *   files    ext4 on the first namespace: write, fsync, drop the file's cached pages, read back and compare
 *   blocks   every other namespace: O_DIRECT writes of one page and reads of pages written earlier
 *
 * What a block must hold is derived from where it is and how often it was written; the generations are kept in memory, so
 * lost memory shows as surely as a lost write. The pattern is computed in user space, which is fast where ring 0 is not.
 *
 * Words of the kernel's command line:
 *
 *   ferry.loop=all|files|blocks|none   what to run (all); none only reports, then sleeps
 *   ferry.loop=SCRIPT                  run the script of that name (in the tools guest), then end
 *   ferry.namespaces=N                 wait for N namespaces, that of ext4 among them (1)
 *   ferry.every=N                      report each N verified blocks (16)
 *   ferry.exit=N                       end after N verified blocks (0: never)
 *   ferry.end=reset|poweroff           how to end (reset; poweroff needs ACPI)
 *
 * Console lines: `guest: init`, `guest: mounted`, `guest: namespaces N` (beside that of ext4), `guest: verified N`,
 * `guest: script passed`, `guest: ERROR what (number)`, `guest: end`. An error ends the guest.
 *
 * No libc: its start-up code and string functions would pick instructions by CPUID, which shows user code the host's.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

enum {
    SYS_READ = 0, SYS_WRITE = 1, SYS_OPEN = 2, SYS_CLOSE = 3, SYS_MMAP = 9, SYS_IOCTL = 16, SYS_PREAD = 17,
    SYS_PWRITE = 18, SYS_NANOSLEEP = 35, SYS_FORK = 57, SYS_EXECVE = 59, SYS_WAIT4 = 61, SYS_FSYNC = 74, SYS_MKDIR = 83,
    SYS_MOUNT = 165, SYS_REBOOT = 169, SYS_SETAFFINITY = 203, SYS_FADVISE = 221,
};

enum { O_RDONLY = 0, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0100, O_DIRECT = 040000 };
enum { EACCES = 13, EBUSY = 16, EEXIST = 17, EROFS = 30 };
#define BLKGETSIZE64 0x80081272
#define FADV_DONTNEED 4

enum {
    PAGE = 4096,
    FILES = 8,           /* files on ext4 */
    FILE_PAGES = 4,      /* pages in each */
    MAX_NAMESPACES = 64, /* block devices looked at */
    RAW_PAGES = 64,      /* pages in use on each, spread over the device */
    DROP_EVERY = 32,     /* file writes between two drops of all caches */
};

static long syscall6(long n, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define sys(n, a, b, c, d) syscall6(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

/* Shared by both tasks. */
struct shared {
    u64 verified;
};

struct namespace {
    int fd;
    u64 pages;
    u32 generation[RAW_PAGES];
};

static struct shared *shared;
static u8 wrote[FILE_PAGES * PAGE] __attribute__((aligned(PAGE)));
static u8 got[FILE_PAGES * PAGE] __attribute__((aligned(PAGE)));
static struct namespace namespaces[MAX_NAMESPACES];
static u32 namespace_count;
static u32 file_generation[FILES];

static const char *option_loop = "all", *option_end = "reset";
static u64 option_exit = 0, option_namespaces = 1, option_every = 16;

/* Text. A line goes out in one write, so that the tasks' lines do not mix. */

struct line {
    u32 length;
    char text[160];
};

static void add_text(struct line *line, const char *text)
{
    while (*text && line->length < sizeof(line->text))
        line->text[line->length++] = *text++;
}

static void add_number(struct line *line, u64 value)
{
    char digits[21];
    int at = 20;
    digits[at] = 0;
    do {
        digits[--at] = '0' + value % 10;
        value /= 10;
    } while (value);
    add_text(line, digits + at);
}

static void print(struct line *line)
{
    add_text(line, "\n");
    sys(SYS_WRITE, 1, line->text, line->length, 0);
}

static void say(const char *text)
{
    struct line line = {0};
    add_text(&line, "guest: ");
    add_text(&line, text);
    print(&line);
}

static void say_number(const char *text, u64 value)
{
    struct line line = {0};
    add_text(&line, "guest: ");
    add_text(&line, text);
    add_text(&line, " ");
    add_number(&line, value);
    print(&line);
}

static void pause_milliseconds(long milliseconds)
{
    long time[2] = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    sys(SYS_NANOSLEEP, time, 0, 0, 0);
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static void end_guest(void)
{
    u32 how = same(option_end, "poweroff") ? 0x4321fedc : 0x01234567;
    say("end");
    sys(SYS_REBOOT, 0xfee1dead, 672274793, how, 0);
    for (;;)
        pause_milliseconds(1000000);
}

static void fail(const char *what, u64 number)
{
    struct line line = {0};
    add_text(&line, "guest: ERROR ");
    add_text(&line, what);
    add_text(&line, " (");
    add_number(&line, number);
    add_text(&line, ")");
    print(&line);
    end_guest();
}

/* A system call that must succeed. */
static long must(const char *what, long result)
{
    if (result < 0)
        fail(what, -result);
    return result;
}

static void must_all(const char *what, long result, u64 length)
{
    if ((u64)must(what, result) != length)
        fail(what, result);
}

/* Patterns. */

static u64 mix(u64 value)
{
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
    value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
    return value ^ (value >> 31);
}

/* A page says where it belongs (`place`), which write made it, and is different in every word. */
static void fill(u8 *page, u64 place, u32 generation)
{
    u64 *words = (u64 *)page;
    u64 seed = mix(place) ^ ((u64)generation << 32);
    for (u32 i = 0; i < PAGE / 8; i++)
        words[i] = mix(seed + i);
}

static void check(const char *what, const u8 *page, u64 place, u32 generation)
{
    const u64 *words = (const u64 *)page;
    u64 seed = mix(place) ^ ((u64)generation << 32);
    for (u32 i = 0; i < PAGE / 8; i++)
        if (words[i] != mix(seed + i))
            fail(what, place);
}

static void verified(u64 pages)
{
    u64 now = __atomic_add_fetch(&shared->verified, pages, __ATOMIC_SEQ_CST);
    u64 before = now - pages;
    if (now / option_every != before / option_every)
        say_number("verified", now);
    if (option_exit && now >= option_exit && before < option_exit)
        end_guest();
}

static u64 random_state = 1;

static u32 random_below(u32 bound)
{
    random_state++;
    return mix(random_state) % bound;
}

/* The files task. */

static u64 file_place(u32 file, u32 page)
{
    return 1ul << 40 | file << 8 | page;
}

static int open_file(u32 file, int flags)
{
    char path[] = "/mnt/file-0";
    path[sizeof(path) - 2] += file;
    return must("open of a file", sys(SYS_OPEN, path, flags, 0600, 0));
}

static void write_file(u32 file)
{
    int fd = open_file(file, O_RDWR | O_CREAT);
    u32 generation = ++file_generation[file];
    for (u32 page = 0; page < FILE_PAGES; page++)
        fill(wrote + page * PAGE, file_place(file, page), generation);
    must_all("write of a file", sys(SYS_PWRITE, fd, wrote, sizeof(wrote), 0), sizeof(wrote));
    must("fsync", sys(SYS_FSYNC, fd, 0, 0, 0));
    must("fadvise", sys(SYS_FADVISE, fd, 0, 0, FADV_DONTNEED));
    sys(SYS_CLOSE, fd, 0, 0, 0);
}

static void read_file(u32 file)
{
    int fd = open_file(file, O_RDONLY);
    must_all("read of a file", sys(SYS_PREAD, fd, got, sizeof(got), 0), sizeof(got));
    must("fadvise", sys(SYS_FADVISE, fd, 0, 0, FADV_DONTNEED));
    sys(SYS_CLOSE, fd, 0, 0, 0);
    for (u32 page = 0; page < FILE_PAGES; page++)
        check("wrong data in a file", got + page * PAGE, file_place(file, page), file_generation[file]);
    verified(FILE_PAGES);
}

static void drop_caches(void)
{
    int fd = must("open of drop_caches", sys(SYS_OPEN, "/proc/sys/vm/drop_caches", O_WRONLY, 0, 0));
    must("drop_caches", sys(SYS_WRITE, fd, "3", 1, 0));
    sys(SYS_CLOSE, fd, 0, 0, 0);
}

static void run_files(void)
{
    for (u32 file = 0; file < FILES; file++)
        write_file(file);
    for (u64 round = 1;; round++) {
        u32 file = random_below(FILES);
        write_file(file);
        if (round % DROP_EVERY == 1)
            drop_caches();
        read_file(file);
        read_file(random_below(FILES));
    }
}

/* The blocks task. */

static u64 raw_place(u32 namespace, u32 slot)
{
    return 2ul << 40 | (u64)namespace << 16 | slot;
}

static u64 raw_offset(u32 namespace, u32 slot)
{
    return namespaces[namespace].pages / RAW_PAGES * slot * PAGE;
}

static void write_block(u32 namespace, u32 slot)
{
    u32 generation = ++namespaces[namespace].generation[slot];
    fill(wrote, raw_place(namespace, slot), generation);
    must_all("write of a block", sys(SYS_PWRITE, namespaces[namespace].fd, wrote, PAGE, raw_offset(namespace, slot)), PAGE);
}

static void read_block(u32 namespace, u32 slot)
{
    u32 generation = namespaces[namespace].generation[slot];
    if (!generation)
        return;
    must_all("read of a block", sys(SYS_PREAD, namespaces[namespace].fd, got, PAGE, raw_offset(namespace, slot)), PAGE);
    check("wrong data in a block", got, raw_place(namespace, slot), generation);
    verified(1);
}

static void run_blocks(void)
{
    for (;;)
        for (u32 namespace = 0; namespace < namespace_count; namespace++) {
            u32 slot = random_below(RAW_PAGES);
            write_block(namespace, slot);
            read_block(namespace, slot);
            read_block(namespace, random_below(RAW_PAGES));
        }
}

/* Start. */

static void device_path(char *path, u32 controller, u32 namespace)
{
    struct line line = {0};
    add_text(&line, "/dev/nvme");
    add_number(&line, controller);
    add_text(&line, "n");
    add_number(&line, namespace);
    line.text[line.length] = 0;
    for (u32 i = 0; i <= line.length; i++)
        path[i] = line.text[i];
}

/* Opens the namespaces that are there, all but the one that ext4 uses; returns how many there are with it. */
static u32 open_namespaces(void)
{
    u32 seen = 0;
    for (u32 i = 0; i < namespace_count; i++)
        sys(SYS_CLOSE, namespaces[i].fd, 0, 0, 0);
    namespace_count = 0;
    for (u32 controller = 0; controller < 4; controller++)
        for (u32 number = 1; number <= MAX_NAMESPACES; number++) {
            char path[32];
            u64 bytes = 0;
            device_path(path, controller, number);
            long fd = sys(SYS_OPEN, path, O_RDWR | O_DIRECT, 0, 0);
            if (fd == -EACCES || fd == -EROFS) {
                seen++;
                continue;
            }
            if (fd < 0)
                break; /* Linux numbers a controller's namespaces without holes */
            seen++;
            must("size of a namespace", sys(SYS_IOCTL, fd, BLKGETSIZE64, &bytes, 0));
            if ((controller == 0 && number == 1) || bytes / PAGE < RAW_PAGES || namespace_count == MAX_NAMESPACES) {
                sys(SYS_CLOSE, fd, 0, 0, 0);
                continue;
            }
            namespaces[namespace_count].fd = fd;
            namespaces[namespace_count].pages = bytes / PAGE;
            namespace_count++;
        }
    return seen;
}

static void wait_for_namespaces(void)
{
    for (u32 attempt = 0; open_namespaces() < option_namespaces; attempt++) {
        if (attempt == 600)
            fail("namespaces do not appear", option_namespaces);
        pause_milliseconds(100);
    }
}

static void pin(u64 cpu)
{
    u64 mask = 1ul << cpu;
    sys(SYS_SETAFFINITY, 0, sizeof(mask), &mask, 0); /* with one CPU the second task stays on it */
}

static const char *value_of(const char *word, const char *name)
{
    while (*name && *word == *name)
        word++, name++;
    return *name == 0 && *word == '=' ? word + 1 : 0;
}

static u64 number(const char *text)
{
    u64 value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + (*text - '0');
    return value;
}

static void read_options(char **words)
{
    const char *value;
    for (; *words; words++) {
        if ((value = value_of(*words, "ferry.loop")))
            option_loop = value;
        else if ((value = value_of(*words, "ferry.end")))
            option_end = value;
        else if ((value = value_of(*words, "ferry.exit")))
            option_exit = number(value);
        else if ((value = value_of(*words, "ferry.namespaces")))
            option_namespaces = number(value);
        else if ((value = value_of(*words, "ferry.every")))
            option_every = number(value);
    }
    if (!option_every)
        option_every = 1;
}

static void make_folder(const char *path)
{
    long result = sys(SYS_MKDIR, path, 0755, 0, 0);
    if (result != -EEXIST)
        must("mkdir", result);
}

static void mount(const char *device, const char *folder, const char *kind)
{
    long result;
    make_folder(folder);
    result = syscall6(SYS_MOUNT, (long)device, (long)folder, (long)kind, 0, 0, 0);
    if (result != -EBUSY)
        must(kind, result);
}

/* User code sees the host's CPUID, but only FXSAVE state is switched where ring 0 is interpreted: glibc must not use more. */
static char *command_environment[] = {
    "PATH=/bin:/usr/sbin",
    "LD_BIND_NOW=1",
    "GLIBC_TUNABLES=glibc.cpu.hwcaps=-XSAVE,-XSAVEC,-AVX,-AVX2,-AVX512F,-AVX512VL,-AVX512BW,-ERMS,-FSRM,"
    "-AVX_Fast_Unaligned_Load",
    0,
};

static void run_script(const char *name)
{
    static struct line path;
    static char *arguments[] = {"busybox", "sh", path.text, 0};
    int status = 0;
    add_text(&path, "/scripts/");
    add_text(&path, name);
    make_folder("/sys");
    make_folder("/tmp");
    mount("sysfs", "/sys", "sysfs");
    long child = must("fork", sys(SYS_FORK, 0, 0, 0, 0));
    if (child == 0)
        must("execve", sys(SYS_EXECVE, "/bin/busybox", arguments, command_environment, 0));
    must("wait4", sys(SYS_WAIT4, child, &status, 0, 0));
    if (status)
        fail(name, status);
    say("script passed");
    end_guest();
}

/* The kernel hands unknown words to init, but not those with a dot (they are a module's): so they are read from proc. */
static void read_command_line(void)
{
    static char text[4096];
    static char *words[256];
    u32 count = 0;
    int fd = must("open of cmdline", sys(SYS_OPEN, "/proc/cmdline", O_RDONLY, 0, 0));
    long length = must("read of cmdline", sys(SYS_READ, fd, text, sizeof(text) - 1, 0));
    sys(SYS_CLOSE, fd, 0, 0, 0);
    for (long i = 0; i < length; i++)
        if (text[i] == ' ' || text[i] == '\n')
            text[i] = 0;
        else if ((i == 0 || text[i - 1] == 0) && count < 255)
            words[count++] = text + i;
    read_options(words);
}

__attribute__((noreturn, used)) static void start(void)
{
    int files, blocks;
    say("init");
    mount("proc", "/proc", "proc");
    mount("devtmpfs", "/dev", "devtmpfs");
    read_command_line();
    shared = (void *)must("mmap", syscall6(SYS_MMAP, 0, PAGE, 3 /* read, write */, 0x21 /* shared, anonymous */, -1, 0));

    wait_for_namespaces();
    files = same(option_loop, "all") || same(option_loop, "files");
    blocks = same(option_loop, "all") || same(option_loop, "blocks");
    if (!files && !blocks && !same(option_loop, "none"))
        run_script(option_loop);
    blocks = blocks && namespace_count;
    if (files) {
        mount("/dev/nvme0n1", "/mnt", "ext4");
        say("mounted");
    }
    say_number("namespaces", namespace_count);
    if (blocks && (!files || must("fork", sys(SYS_FORK, 0, 0, 0, 0)) == 0)) {
        pin(1);
        run_blocks();
    }
    if (files) {
        pin(0);
        run_files();
    }
    for (;;)
        pause_milliseconds(1000000);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall start\n");
