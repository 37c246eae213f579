// 8-bit weights, in the layout a checkpoint stores, times a few rows of 16-bit activations; and the weights alone in 16
// bit, for a matrix product over many rows. Compiled after `floats.cu`.
//
// packed [N, K] are bytes, scales [N, K/G] float16, w = (byte - 128) * s. Kernels take pointers and 64-bit integers, but
// compute with 32 bits: N * K must be below 2^31, and N, for the grid's sake, at most 262,140. G must be a multiple of
// RUN; x, packed and the unpacked weights lie on multiples of 16 bytes.

constexpr int RUN = 16;     // inputs a thread takes in one go: a quad of bytes, which share their scale
constexpr int COLUMNS = 4;  // outputs of a block, whose weights are on their way at once
constexpr int WARP = 32;
constexpr int MOST_WARPS = 8;

// Byte i of a word, less 128. 2^23 + byte is a float whose lowest bits are the byte, and the difference is exact.
__device__ inline float step(Word word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 | i)) - 8388736.0f;
}

// Number i of those that a quad holds two to a word.
template <typename Float>
__device__ float number(const Quad& quad, int i) {
    return Float::widen(quad.word[i / 2] >> i % 2 * 16);
}

// ---- a few rows -----------------------------------------------------------------------------------------------------
// A block owns COLUMNS outputs; its threads take their inputs a run each, in turns. A warp's sums are added by halves,
// then the warps' in their order: by nothing but the number of inputs, so a row's product has the same bits every time,
// whatever rows come with it.

// RUN inputs of each row times those of each column, which wait for their scale: a product of a 16-bit float and a step
// is exact in float.
template <typename Float, int ROWS>
__device__ void add_run(float (&sum)[COLUMNS][ROWS], const Bits* x, const int (&row_at)[ROWS],
                        const Quad (&bytes)[COLUMNS], const float (&scale)[COLUMNS]) {
    float of_run[COLUMNS][ROWS] = {};
#pragma unroll
    for (int half = 0; half < RUN; half += 8) {
        Quad inputs[ROWS];
#pragma unroll
        for (int m = 0; m < ROWS; m++) inputs[m] = *reinterpret_cast<const Quad*>(x + row_at[m] + half);
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float q = step(bytes[c].word[(half + i) / 4], i % 4);
#pragma unroll
                for (int m = 0; m < ROWS; m++) of_run[c][m] = fmaf(number<Float>(inputs[m], i), q, of_run[c][m]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int m = 0; m < ROWS; m++) sum[c][m] = fmaf(scale[c], of_run[c][m], sum[c][m]);
}

// The block's sum for column threadIdx.x / ROWS and row threadIdx.x % ROWS, in the first COLUMNS * ROWS threads.
template <int ROWS>
__device__ float add_threads(const float (&sum)[COLUMNS][ROWS]) {
    __shared__ float of_warp[MOST_WARPS][COLUMNS * ROWS];
#pragma unroll
    for (int i = 0; i < COLUMNS * ROWS; i++) {
        float total = sum[i / ROWS][i % ROWS];
#pragma unroll
        for (int other = WARP / 2; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
        if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP][i] = total;
    }
    __syncthreads();
    float total = 0;
    if (threadIdx.x < COLUMNS * ROWS) {
        for (int warp = 0; warp < blockDim.x / WARP; warp++) total += of_warp[warp][threadIdx.x];
    }
    return total;
}

// x [rows, K] -> out [rows, N], ROWS rows to a block: grid (ceil(rows / ROWS), ceil(N / COLUMNS)), whole warps, at most
// MOST_WARPS. Blocks that read the same weights start together, so all but one find them in the cache.
template <typename Float, int ROWS>
__device__ void multiply(const Bits* x, const unsigned char* packed, const Bits* scales, Bits* out, int rows,
                         int in_features, int columns, int group_size) {
    int first_row = blockIdx.x * ROWS, first_column = blockIdx.y * COLUMNS, groups = in_features / group_size;
    int row_at[ROWS], column[COLUMNS];  // what is not there repeats the last one
#pragma unroll
    for (int m = 0; m < ROWS; m++) row_at[m] = (first_row + m < rows ? first_row + m : rows - 1) * in_features;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) column[c] = first_column + c < columns ? first_column + c : columns - 1;
    float sum[COLUMNS][ROWS] = {};
    for (int k = threadIdx.x * RUN; k < in_features; k += blockDim.x * RUN) {
        Quad bytes[COLUMNS];
        float scale[COLUMNS];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            bytes[c] = *reinterpret_cast<const Quad*>(packed + column[c] * in_features + k);
            scale[c] = half_to_float(scales[column[c] * groups + k / group_size]);
        }
        add_run<Float, ROWS>(sum, x + k, row_at, bytes, scale);
    }
    float total = add_threads<ROWS>(sum);
    int row = first_row + threadIdx.x % ROWS, of_column = first_column + threadIdx.x / ROWS;
    if (threadIdx.x < COLUMNS * ROWS && row < rows && of_column < columns) {
        out[row * columns + of_column] = Float::round(total);
    }
}

// ---- many rows ------------------------------------------------------------------------------------------------------
// The weights of whole columns, one after another, rounded once: 8 to a thread, 256 threads.

template <typename Float>
__device__ void unpack(const uint2* packed, const Bits* scales, Quad* out, int eights, int group_size) {
    int eight = blockIdx.x * 256 + threadIdx.x;
    if (eight >= eights) return;
    uint2 bytes = packed[eight];
    float scale = half_to_float(scales[eight / (group_size / 8)]);
    Quad weights;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        Word word = i < 2 ? bytes.x : bytes.y;
        Bits low = Float::round(step(word, i % 2 * 2) * scale), high = Float::round(step(word, i % 2 * 2 + 1) * scale);
        weights.word[i] = low | (Word)high << 16;
    }
    out[eight] = weights;
}

#define MULTIPLY(NAME, FLOAT, ROWS)                                                                               \
    extern "C" __global__ void __launch_bounds__(WARP * MOST_WARPS)                                               \
        NAME##_##ROWS(const Bits* __restrict__ x, const unsigned char* __restrict__ packed,                       \
                      const Bits* __restrict__ scales, Bits* __restrict__ out, long long rows,                    \
                      long long in_features, long long columns, long long group_size) {                           \
        multiply<FLOAT, ROWS>(x, packed, scales, out, rows, in_features, columns, group_size);                    \
    }

#define UNPACK(NAME, FLOAT)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                             \
        NAME(const uint2* __restrict__ packed, const Bits* __restrict__ scales, Quad* __restrict__ out,           \
             long long eights, long long group_size) {                                                            \
        unpack<FLOAT>(packed, scales, out, eights, group_size);                                                   \
    }

#define KERNELS(SUFFIX, FLOAT)            \
    MULTIPLY(multiply_##SUFFIX, FLOAT, 1) \
    MULTIPLY(multiply_##SUFFIX, FLOAT, 4) \
    UNPACK(unpack_##SUFFIX, FLOAT)

KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
