// Sixteen bytes read at once, and float16 and bfloat16 as float32 and back: what all kernels of this folder begin with.
// No header is needed: NVRTC compiles this file as it is.

typedef unsigned int Word;
typedef unsigned short Bits;  // of a float16 or a bfloat16

struct alignas(16) Quad {
    Word word[4];
};

#ifdef __CUDACC__

__device__ inline float half_to_float(Bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline Bits float_to_half(float value) {
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

struct Half {
    static __device__ float widen(Bits bits) { return half_to_float(bits); }
    static __device__ Bits round(float value) { return float_to_half(value); }
};

struct BFloat16 {
    static __device__ float widen(Bits bits) { return __uint_as_float((Word)bits << 16); }

    // To nearest, ties to even, by hand: Turing has no instruction for it. A NaN stays one.
    static __device__ Bits round(float value) {
        Word word = __float_as_uint(value);
        return value != value ? (word >> 16) | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
};

