// Lets a C++ compiler read a CUDA source, and runs its kernels on the CPU: a block's threads are fibers that take turns,
// each until it waits for others, first to last and then last to first, so that one that does not wait reads too early.

#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

typedef long long Argument;
typedef void (*Kernel)(Argument, Argument, Argument, Argument, Argument, Argument, Argument, Argument, Argument);

static struct { unsigned x, y; } threadIdx, blockIdx, blockDim;

struct uint2 {
    unsigned x, y;
};

template <typename To, typename From>
static To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "");
    memcpy(&to, &from, sizeof to);
    return to;
}

static float __uint_as_float(unsigned word) { return same_bits<float>(word); }
static unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
static float half_to_float(unsigned short bits) { return same_bits<_Float16>(bits); }
static unsigned short float_to_half(float value) { return same_bits<unsigned short>((_Float16)value); }

static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    unsigned long long bytes = low | (unsigned long long)high << 32;
    unsigned chosen = 0;
    for (int i = 0; i < 4; i++) chosen |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return chosen;
}

struct Fiber {
    ucontext_t at;
    unsigned shuffles;
    std::vector<char> stack = std::vector<char>(64 * 1024);
    bool done;
};

static ucontext_t block;
static Fiber* running;
static Kernel kernel;
static const Argument* a;

static void __syncthreads() { swapcontext(&running->at, &block); }

// Values lie in two buffers in turn: by the time a fiber writes to one again, all have read what it held.
static float __shfl_xor_sync(unsigned, float value, int lanes) {
    static float shown[2][1024];
    float* now = shown[running->shuffles++ % 2];
    now[threadIdx.x] = value;
    __syncthreads();
    return now[threadIdx.x ^ lanes];
}

static void run_thread() {
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
    running->done = true;
}

static void run_block(std::vector<Fiber>& fibers) {
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.at);
        fiber.at.uc_stack.ss_sp = fiber.stack.data();
        fiber.at.uc_stack.ss_size = fiber.stack.size();
        fiber.at.uc_link = &block;
        fiber.done = false;
        fiber.shuffles = 0;
        makecontext(&fiber.at, run_thread, 0);
    }
    bool waiting = true;
    for (unsigned round = 0; waiting; round++) {
        waiting = false;
        for (unsigned i = 0; i < fibers.size(); i++) {
            unsigned thread = round % 2 ? fibers.size() - 1 - i : i;
            if (fibers[thread].done) continue;
            threadIdx.x = thread;
            running = &fibers[thread];
            swapcontext(&block, &running->at);
            waiting = waiting || !running->done;
        }
    }
}

extern "C" void launch(Kernel started, unsigned grid_x, unsigned grid_y, unsigned threads, const Argument* arguments) {
    std::vector<Fiber> fibers(threads);
    kernel = started;
    a = arguments;
    blockDim.x = threads;
    for (blockIdx.y = 0; blockIdx.y < grid_y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid_x; blockIdx.x++) run_block(fibers);
}
