// Rows of bfloat16 times 4-bit weights in the blocks of torch's AVX-512 packing -> bfloat16, summed in float32.
//
// A block has 64 columns: for each input k 32 bytes, of which byte j holds column j (low) and column j + 32 (high). Two
// inputs fill a register; a table turns a nibble q into the bfloat16 q - 8, which is exact, and one instruction adds the
// products of both to each column's sum. A group ends with y += scale * sum + zero * (the sum of the group's inputs).
// Compiled after `team.c`.

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vbmi,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    COLUMNS = 64,
    HALF = COLUMNS / 2,
    QUARTERS = 4,
    QUARTER = COLUMNS / QUARTERS,
    TILE = 4,     // rows at once: 16 of 32 registers hold their sums
    PASS = 256,   // rows that a third-level cache holds while all blocks pass by
    AHEAD = 4096, // bytes to ask memory for before they are needed
};

typedef struct {
    const uint16_t *x;       // [rows, inputs] bfloat16
    const float *group_sums; // [rows, groups]
    const uint8_t *packed;   // [columns / 64, inputs, 32]
    const uint16_t *pairs;   // [groups, columns, 2] bfloat16: scale, zero
    uint16_t *out;           // [rows, columns] bfloat16
    int64_t rows, inputs, columns, group_size;
} Product;

// What a nibble stands for and, for either half of two inputs' bytes, how they come to lie side by side in 16 bits each.
typedef struct {
    __m512i values, first, second;
} Tables;

INLINE Tables make_tables(void) {
    uint16_t values[32];
    uint8_t first[64] = {0}, second[64] = {0};
    for (int i = 0; i < 32; i++) {
        float value = (float)((i & 15) - 8);
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
    for (int j = 0; j < QUARTER; j++) {
        first[4 * j] = (uint8_t)j, first[4 * j + 2] = (uint8_t)(HALF + j);
        second[4 * j] = (uint8_t)(QUARTER + j), second[4 * j + 2] = (uint8_t)(HALF + QUARTER + j);
    }
    return (Tables){_mm512_loadu_si512(values), _mm512_loadu_si512(first), _mm512_loadu_si512(second)};
}

INLINE __m512 widen(__m512i low_halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(low_halves, 16)); }

// Of one group: sums[row][quarter] = x . (q - 8).
INLINE void sum_group(int rows, const uint16_t *x, int64_t inputs, const uint8_t *packed, int64_t group_size,
                      const Tables *tables, __m512 sums[][QUARTERS]) {
    const __mmask64 low_bytes = 0x5555555555555555ull;
    const __m512i nibble = _mm512_set1_epi16(15);
    for (int64_t k = 0; k < group_size; k += 2, packed += 2 * HALF) {
        _mm_prefetch((const char *)packed + AHEAD, _MM_HINT_T0);
        __m512i bytes = _mm512_loadu_si512(packed);
        __m512i first = _mm512_maskz_permutexvar_epi8(low_bytes, tables->first, bytes);
        __m512i second = _mm512_maskz_permutexvar_epi8(low_bytes, tables->second, bytes);
        __m512bh weights[QUARTERS] = {
            (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(first, nibble), tables->values),
            (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(second, nibble), tables->values),
            (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), tables->values),
            (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), tables->values),
        };
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * inputs + k, sizeof pair);
            for (int c = 0; c < QUARTERS; c++)
                sums[r][c] = _mm512_dpbf16_ps(sums[r][c], (__m512bh)_mm512_set1_epi32(pair), weights[c]);
        }
    }
}

INLINE void multiply_tile(const Product *p, int64_t block, int64_t row, int rows, const Tables *tables) {
    const int64_t groups = p->inputs / p->group_size;
    const uint8_t *packed = p->packed + block * p->inputs * HALF;
    __m512 totals[TILE][QUARTERS];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < QUARTERS; c++) totals[r][c] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        const uint16_t *pairs = p->pairs + 2 * (group * p->columns + block * COLUMNS);
        for (int line = 0; line < QUARTERS; line++) // far apart, so that no processor foresees them
            _mm_prefetch((const char *)(pairs + 2 * (p->columns + line * QUARTER)), _MM_HINT_T0);
        __m512 sums[TILE][QUARTERS];
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < QUARTERS; c++) sums[r][c] = _mm512_setzero_ps();
        sum_group(rows, p->x + row * p->inputs + group * p->group_size, p->inputs,
                  packed + group * p->group_size * HALF, p->group_size, tables, sums);
        for (int c = 0; c < QUARTERS; c++) {
            __m512i pair = _mm512_loadu_si512(pairs + 2 * c * QUARTER);
            __m512 scale = widen(pair), zero = widen(_mm512_srli_epi32(pair, 16));
            for (int r = 0; r < rows; r++) {
                __m512 inputs = _mm512_set1_ps(p->group_sums[(row + r) * groups + group]);
                totals[r][c] = _mm512_fmadd_ps(scale, sums[r][c], _mm512_fmadd_ps(zero, inputs, totals[r][c]));
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < QUARTERS; c++)
            _mm256_storeu_si256((__m256i *)(p->out + (row + r) * p->columns + block * COLUMNS + c * QUARTER),
                                (__m256i)_mm512_cvtneps_pbh(totals[r][c]));
}

// Whether this processor has the instructions.
int lowvram_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512bf16");
}

INLINE void multiply_block(const Product *p, int64_t block, int64_t row, int64_t last_row, const Tables *tables) {
    for (; row + TILE <= last_row; row += TILE) multiply_tile(p, block, row, TILE, tables);
    switch (last_row - row) { // the number of rows is a constant of each, so that sums stay in registers
        case 3: multiply_tile(p, block, row, 3, tables); break;
        case 2: multiply_tile(p, block, row, 2, tables); break;
        case 1: multiply_tile(p, block, row, 1, tables); break;
    }
}

// All rows by the blocks of 64 columns from `first` to before `last`. A row has the same bits whatever comes with it.
TARGET static void multiply_blocks(const void *task, int64_t first, int64_t last) {
    const Product *product = task;
    const Tables tables = make_tables();
    for (int64_t row = 0; row < product->rows; row += PASS) {
        const int64_t rest = product->rows - row;
        for (int64_t block = first; block < last; block++)
            multiply_block(product, block, row, row + (rest < PASS ? rest : PASS), &tables);
    }
}

void lowvram_multiply(const Team *team, const Product *product, unsigned threads) {
    share_out(team, threads, multiply_blocks, product, product->columns / COLUMNS);
}
