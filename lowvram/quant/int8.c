// A few rows of float32 times 8-bit weights as they are stored -> float32.
//
// A column's inputs lie in a row of bytes, each w / scale + 128, with a float16 scale for each group. Eight of them
// become floats, which is exact, and one instruction adds their products with a row's inputs to eight sums. A group ends
// with totals += scale * sums; the eight totals are added at the column's end. Compiled after `team.c`.

#include <cpuid.h>
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#define UNROLLED _Pragma("GCC unroll 4")

enum {
    RUN = 8,      // inputs at once; groups are multiples of it
    COLUMNS = 4,  // a piece of the work. One row or two take them all at once, so that each sum is waited for less often
    ROWS = 4,     // at once; three of them or four take HALF of the columns: at most 8 of 16 registers hold their sums
    HALF = COLUMNS / 2,
    LINE = 64,    // bytes that come from memory together
    AHEAD = 4096, // bytes to ask memory for before they are needed
};

typedef struct {
    const float *x;         // [rows, inputs]
    const uint8_t *packed;  // [columns, inputs]
    const uint16_t *scales; // [columns, groups] float16
    float *out;             // [rows, columns]
    int64_t rows, inputs, columns, group_size;
} Product;

// Bytes less 128.
INLINE __m256 steps(const uint8_t *bytes) {
    __m128i signed_bytes = _mm_xor_si128(_mm_loadl_epi64((const __m128i *)bytes), _mm_set1_epi8(-128));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(signed_bytes));
}

INLINE float add_up(__m256 values) {
    float v[RUN];
    _mm256_storeu_ps(v, values);
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Of one group: sums[column][row] = x . steps.
INLINE void sum_group(int columns, int rows, const float *x, const uint8_t *packed, int64_t inputs, int64_t group_size,
                      __m256 sums[][ROWS]) {
    for (int64_t k = 0; k < group_size; k += RUN) {
        __m256 q[COLUMNS];
        UNROLLED for (int c = 0; c < columns; c++) {
            const uint8_t *bytes = packed + c * inputs + k;
            if (k % LINE == 0) _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T0);
            q[c] = steps(bytes);
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            __m256 values = _mm256_loadu_ps(x + r * inputs + k);
            UNROLLED for (int c = 0; c < columns; c++) sums[c][r] = _mm256_fmadd_ps(values, q[c], sums[c][r]);
        }
    }
}

INLINE void multiply_tile(const Product *p, int64_t column, int64_t row, int columns, int rows) {
    const int64_t groups = p->inputs / p->group_size;
    __m256 totals[COLUMNS][ROWS];
    UNROLLED for (int c = 0; c < columns; c++)
        UNROLLED for (int r = 0; r < rows; r++) totals[c][r] = _mm256_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        const int64_t k = group * p->group_size;
        __m256 sums[COLUMNS][ROWS];
        UNROLLED for (int c = 0; c < columns; c++)
            UNROLLED for (int r = 0; r < rows; r++) sums[c][r] = _mm256_setzero_ps();
        sum_group(columns, rows, p->x + row * p->inputs + k, p->packed + column * p->inputs + k, p->inputs,
                  p->group_size, sums);
        UNROLLED for (int c = 0; c < columns; c++) {
            __m256 scale = _mm256_set1_ps(_cvtsh_ss(p->scales[(column + c) * groups + group]));
            UNROLLED for (int r = 0; r < rows; r++) totals[c][r] = _mm256_fmadd_ps(scale, sums[c][r], totals[c][r]);
        }
    }
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++) p->out[(row + r) * p->columns + column + c] = add_up(totals[c][r]);
}

// Some rows by a whole piece, so many columns at once.
INLINE void multiply_piece(const Product *p, int64_t column, int64_t row, int columns, int rows) {
    for (int c = 0; c < COLUMNS; c += columns) multiply_tile(p, column + c, row, columns, rows);
}

// Whether this processor has the instructions.
int lowvram_supported(void) {
    unsigned a, b, of_1, d; // what CPUID gives of leaf 1: GCC before 11 knows no "f16c" by name
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &of_1, &d) &&
           (of_1 & bit_F16C) != 0;
}

// All rows by the pieces from `first` to before `last`. A row has the same bits whatever comes with it.
TARGET static void multiply_pieces(const void *task, int64_t first, int64_t last) {
    const Product *p = task;
    for (int64_t column = first * COLUMNS; column < last * COLUMNS && column < p->columns; column += COLUMNS) {
        const int64_t there = p->columns - column;
        int64_t row = 0;
        if (there < COLUMNS) { // the last ones, one by one
            for (int64_t c = 0; c < there; c++)
                for (row = 0; row < p->rows; row++) multiply_tile(p, column + c, row, 1, 1);
            continue;
        }
        for (; row + ROWS <= p->rows; row += ROWS) multiply_piece(p, column, row, HALF, ROWS);
        switch (p->rows - row) { // the number of rows is a constant of each, so that sums stay in registers
            case 3: multiply_piece(p, column, row, HALF, 3); break;
            case 2: multiply_piece(p, column, row, COLUMNS, 2); break;
            case 1: multiply_piece(p, column, row, COLUMNS, 1); break;
        }
    }
}

void lowvram_multiply(const Team *team, const Product *product, unsigned threads) {
    share_out(team, threads, multiply_pieces, product, (product->columns + COLUMNS - 1) / COLUMNS);
}
