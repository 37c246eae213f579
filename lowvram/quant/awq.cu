// AWQ's 4-bit weights, in the layout a checkpoint stores, times a few rows of 16-bit activations; and the weights alone
// in 16 bit, for a matrix product over many rows. Compiled after `floats.cu`.
//
// qweight [K, N/8] and qzeros [K/G, N/8] hold eight columns to a word, scales [K/G, N] are float16, w = (q - z) * s.
// Kernels take pointers and 64-bit integers, nine in all, but compute with 32 bits: K * N / 8 must be below 2^31. G must
// be a multiple of RUN.

constexpr int COLUMNS = 8;  // of a word
constexpr int RUN = 32;     // inputs a thread takes in one go; they share their scales and zero points
constexpr int BATCH = 8;    // of them whose words are on their way at once

// The 4-bit number q of a column, as the float 1024 + q: 2^10 with q at 2^0, the 13th bit of the mantissa.
__device__ inline float biased(Word word, int column) {
    int nibble = column % 2 * 4 + column / 2;
    return __uint_as_float(0x44800000u | (word >> 4 * nibble & 15u) << 13);
}

// The scales and zero points of a word's columns in one group. A product of 1024 + q (11 bits) and a scale (11 bits) is
// exact in float, and so is w = (1024 + q) * s - (1024 + z) * s, which takes one instruction.
struct Group {
    float scale[COLUMNS];
    float offset[COLUMNS];

    __device__ Group(const Word* qzeros, const Bits* scales, int index) {
        Word zeros = qzeros[index];
        Quad packed = reinterpret_cast<const Quad*>(scales)[index];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            scale[c] = half_to_float(packed.word[c / 2] >> c % 2 * 16);
            offset[c] = -biased(zeros, c) * scale[c];
        }
    }

    __device__ float weight(Word word, int column) const {
        return fmaf(biased(word, column), scale[column], offset[column]);
    }
};

// ---- a few rows -----------------------------------------------------------------------------------------------------
// A block owns TILE words of columns: one 32-byte sector of memory per row of qweight. It cuts the inputs into SLICES;
// a thread owns one word and one slice. The slices' sums are added in an order that depends on nothing but SLICES, so a
// row's product has the same bits every time, whatever rows come with it.

constexpr int TILE = 8;
constexpr int SLICES = 64;
constexpr int PARTS = 8;                       // the slices are added in two steps
constexpr int PADDED = COLUMNS * TILE + TILE;  // puts the four slices of a warp into different banks

template <typename Float, int ROWS>
__device__ void add_run(float (&sum)[ROWS][COLUMNS], const Bits* x, const int (&row_at)[ROWS], const Word* qweight,
                        int words, const Group& group) {
#pragma unroll 1
    for (int start = 0; start < RUN; start += BATCH) {
        Word q[BATCH];
        Quad inputs[ROWS];
#pragma unroll
        for (int i = 0; i < BATCH; i++) q[i] = qweight[(start + i) * words];
#pragma unroll
        for (int m = 0; m < ROWS; m++) inputs[m] = *reinterpret_cast<const Quad*>(x + row_at[m] + start);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            float value[ROWS];
#pragma unroll
            for (int m = 0; m < ROWS; m++) value[m] = Float::widen(inputs[m].word[i / 2] >> i % 2 * 16);
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float w = group.weight(q[i], c);
#pragma unroll
                for (int m = 0; m < ROWS; m++) sum[m][c] = fmaf(value[m], w, sum[m][c]);
            }
        }
    }
}

// One column's sum over all slices, in the first COLUMNS * TILE threads.
__device__ inline float add_slices(const float (&sum)[COLUMNS], int slice, int lane) {
    __shared__ float of_slice[SLICES * PADDED];
    __shared__ float of_part[PARTS * COLUMNS * TILE];
    int column = threadIdx.x % (COLUMNS * TILE), part = threadIdx.x / (COLUMNS * TILE);
    float total = 0;
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) of_slice[slice * PADDED + c * TILE + lane] = sum[c];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLICES / PARTS; i++) total += of_slice[(part * (SLICES / PARTS) + i) * PADDED + column];
    of_part[threadIdx.x] = total;
    __syncthreads();
    total = 0;
    if (part == 0) {
#pragma unroll
        for (int p = 0; p < PARTS; p++) total += of_part[p * COLUMNS * TILE + column];
    }
    return total;
}

// x [rows, K] -> out [rows, N], ROWS rows to a block: grid (ceil(rows / ROWS), ceil(words / TILE)), TILE * SLICES
// threads. Blocks that read the same words start together, so all but one find them in the cache. x and scales lie on
// multiples of 16 bytes.
template <typename Float, int ROWS>
__device__ void multiply(const Bits* x, const Word* qweight, const Word* qzeros, const Bits* scales, Bits* out,
                         int rows, int in_features, int words, int group_size) {
    int slice = threadIdx.x / TILE, lane = threadIdx.x % TILE;
    int word = blockIdx.y * TILE + lane, first = blockIdx.x * ROWS;
    int row_at[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; m++) {  // rows that are not there repeat the last one
        row_at[m] = (first + m < rows ? first + m : rows - 1) * in_features;
    }
    float sum[ROWS][COLUMNS] = {};
    if (word < words) {
        for (int k = slice * RUN; k < in_features; k += SLICES * RUN) {
            Group group(qzeros, scales, k / group_size * words + word);
            add_run<Float>(sum, x + k, row_at, qweight + k * words + word, words, group);
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        float total = add_slices(sum[m], slice, lane);
        int column_word = blockIdx.y * TILE + threadIdx.x % TILE;
        if (threadIdx.x < COLUMNS * TILE && column_word < words && first + m < rows) {
            out[((first + m) * words + column_word) * COLUMNS + threadIdx.x / TILE] = Float::round(total);
        }
    }
}

// ---- many rows ------------------------------------------------------------------------------------------------------
// Weights [K, n] of n columns from word `first_word` on, `n_words` of them, rounded once: grid (ceil(n_words / 32),
// ceil(K / (8 * RUN))), 256 threads.

template <typename Float>
__device__ void unpack(const Word* qweight, const Word* qzeros, const Bits* scales, Bits* out, int first_word,
                       int n_words, int in_features, int words, int group_size) {
    int word = blockIdx.x * 32 + threadIdx.x % 32;
    int start = (blockIdx.y * 8 + threadIdx.x / 32) * RUN;
    if (word >= n_words || start >= in_features) return;
    Group group(qzeros, scales, start / group_size * words + first_word + word);
#pragma unroll BATCH
    for (int k = start; k < start + RUN; k++) {
        Word q = qweight[k * words + first_word + word];
        Quad weights;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Bits low = Float::round(group.weight(q, 2 * i)), high = Float::round(group.weight(q, 2 * i + 1));
            weights.word[i] = low | (Word)high << 16;
        }
        reinterpret_cast<Quad*>(out)[k * n_words + word] = weights;
    }
}

#define MULTIPLY(NAME, FLOAT, ROWS)                                                                                  \
    extern "C" __global__ void __launch_bounds__(TILE * SLICES)                                                      \
        NAME##_##ROWS(const Bits* __restrict__ x, const Word* __restrict__ qweight, const Word* __restrict__ qzeros, \
                      const Bits* __restrict__ scales, Bits* __restrict__ out, long long rows, long long in_features, \
                      long long words, long long group_size) {                                                       \
        multiply<FLOAT, ROWS>(x, qweight, qzeros, scales, out, rows, in_features, words, group_size);                \
    }

#define UNPACK(NAME, FLOAT)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256)                                                                \
        NAME(const Word* __restrict__ qweight, const Word* __restrict__ qzeros, const Bits* __restrict__ scales,     \
             Bits* __restrict__ out, long long first_word, long long n_words, long long in_features, long long words, \
             long long group_size) {                                                                                 \
        unpack<FLOAT>(qweight, qzeros, scales, out, first_word, n_words, in_features, words, group_size);            \
    }

#define KERNELS(SUFFIX, FLOAT)            \
    MULTIPLY(multiply_##SUFFIX, FLOAT, 1) \
    MULTIPLY(multiply_##SUFFIX, FLOAT, 4) \
    UNPACK(unpack_##SUFFIX, FLOAT)

KERNELS(float16, Half)
KERNELS(bfloat16, BFloat16)
