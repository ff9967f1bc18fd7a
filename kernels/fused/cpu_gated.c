/* The gate of an MLP. The formulas stand in cpu_gated.py. */

#include "exponential.h"

#define WORTH_THREADS 16384 /* numbers */

INLINED float silu(float g) { return g / (1 + exponential(-g)); }

/* (1 + tanh(z)) / 2 = 1 / (1 + e^−2z), and 2·√(2/π) = 1.5957… */
INLINED float gelu_tanh(float g) { return g / (1 + exponential(-1.59576912f * (g + 0.044715f * g * g * g))); }

/* ln erfc(t / √2) is smooth: a polynomial without a constant, by weighted least squares on [0, 6], true to 3e-9.
 * Beyond, erfc is less than 2e-9, for which 0 stands: (1 + erf) has lost it long before in float32. */
INLINED float gelu(float g) {
    float size = g < 0 ? -g : g, t = size > 6 ? 6 : size;
    float high = 6.7038563e-5f + t * (-1.1464663e-5f + t * (1.2255642e-6f + t * (-7.6068368e-8f + t * 2.094791e-9f)));
    float logarithm = t * (-0.7978847f + t * (-0.31830865f + t * (-0.036339596f + t * (0.0047862954f
                      + t * (4.0170162e-5f + t * (-2.2472591e-4f + t * high))))));
    float half = size > 6 ? 0 : 0.5f * exponential(logarithm);
    return g * (g < 0 ? half : 1 - half);
}

/* What the activation gives is rounded, and the product after it. Rows of gate and up begin `stride` numbers apart, those
 * of y lie close. */
#define DEFINE(activation, T)                                                                     \
    FOR_EACH_CPU static void row_##activation##_##T(const T *gate, const T *up, T *y, int64_t width) { \
        _Pragma("omp simd") for (int64_t i = 0; i < width; i++)                                   \
            y[i] = narrow_##T(widen_##T(narrow_##T(activation(widen_##T(gate[i])))) * widen_##T(up[i])); \
    }                                                                                             \
    void loraplex_gated_##activation##_##T(const T *gate, const T *up, T *y, int64_t num_rows, int64_t width, \
                                           int64_t stride, int num_threads) {                     \
        _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1 && num_rows * width >= WORTH_THREADS)") { \
            int64_t me = omp_get_thread_num(), all = omp_get_num_threads();                       \
            for (int64_t row = num_rows * me / all; row < num_rows * (me + 1) / all; row++)       \
                row_##activation##_##T(gate + row * stride, up + row * stride, y + row * width, width); \
        }                                                                                         \
    }

DEFINE(silu, float)
DEFINE(silu, bfloat16)
DEFINE(gelu, float)
DEFINE(gelu, bfloat16)
DEFINE(gelu_tanh, float)
DEFINE(gelu_tanh, bfloat16)
