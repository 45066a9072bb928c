// Rows of packed numbers, which are read once and unpacked in registers: the products of queries and keys, and the sums
// of values by weights. packed_attention.cpp follows this in the same unit.
//
// Codes are read as words of 32 bits, shifted apart and converted: compilers have slow ways from bytes to floats. All
// inner loops are written in vectors (of GCC and Clang) of LANES numbers, since PyTorch lets its compiler find none.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __clang__
#pragma STDC FP_CONTRACT ON
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#pragma GCC push_options
#pragma GCC optimize("O2", "fp-contract=fast")
#define UNROLLED _Pragma("GCC unroll 64")
#endif

#define INLINE inline __attribute__((always_inline))

namespace compresskv {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BLOCK = 128;  // tokens whose weights are held at once
constexpr int64_t MANY = 1 << 15;  // numbers of a layer from which on threads pay
constexpr float LOWEST = -3e38f;

template <typename T, int N>
struct Vector {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <int N>
using Floats = typename Vector<float, N>::type;
template <int N>
using Ints = typename Vector<int32_t, N>::type;

template <typename V>
INLINE V load(const void* from) {
    V loaded;
    std::memcpy(&loaded, from, sizeof(loaded));
    return loaded;
}

template <typename V>
INLINE void store(float* to, const V& stored) {
    std::memcpy(to, &stored, sizeof(stored));
}

template <int N>
INLINE float sum(const Floats<N>& all) {
    if constexpr (N == 1) {
        return all[0];
    } else if constexpr (N == 2) {
        return all[0] + all[1];
    } else {
        Floats<N / 2> halves[2];
        std::memcpy(halves, &all, sizeof(all));
        return sum<N / 2>(halves[0] + halves[1]);
    }
}

// 2 ** x, of numbers that are not above 0, to 2e-7 of it.
template <int N>
INLINE Floats<N> power_of_two(Floats<N> x) {
    x = x < -126.0f ? Floats<N>{} - 126.0f : x;
    const Ints<N> whole = __builtin_convertvector(x - 0.5f, Ints<N>);
    const Floats<N> y = (x - __builtin_convertvector(whole, Floats<N>)) * 0.6931471805599453f;
    const Floats<N> rest = 1 / 6.0f + y * (1 / 24.0f + y * (1 / 120.0f + y * (1 / 720.0f)));
    return (Floats<N>)((whole + 127) << 23) * (1.0f + y * (1.0f + y * (0.5f + y * rest)));
}

// Numbers of 16 bits (float16), one in the lower half of each word.
template <int N>
INLINE Floats<N> widened(const Ints<N>& halves) {
    const Ints<N> rest = (halves & 0x7fff) << 13;
    const Floats<N> large = (Floats<N>)(rest + (112 << 23));
    const Floats<N> small = (Floats<N>)(rest + (113 << 23)) - 0x1p-14f;  // below 2 ** -14, exponents are written as 0
    const Floats<N> number = (halves & 0x7c00) == 0 ? small : large;
    return (Floats<N>)((Ints<N>)number | ((halves & 0x8000) << 16));
}

INLINE float widened(uint16_t half) { return widened<4>(Ints<4>{} + half)[0]; }

// How the D numbers of a token lie in memory: in 8, 4 or 2 bits, or as floats (32). UNITS loads give PLANES vectors
// each.
// Of short rows, one load gives those of several tokens; else the last load may reach into what follows.
template <int BITS, int D>
struct Row {
    static constexpr int PLANES = 32 / BITS;
    static constexpr int WORDS = D / PLANES;
    static constexpr int N = LANES;
    static constexpr int TOKENS = WORDS < N && N % WORDS == 0 ? N / WORDS : 1;
    static constexpr int UNITS = (WORDS + N - 1) / N;
    static constexpr int BEYOND = TOKENS > 1 ? 0 : UNITS * N - WORDS;  // words
    static constexpr int MARGIN = (BEYOND + WORDS - 1) / WORDS;  // tokens
    static constexpr int PLANE = UNITS * N;  // where in arranged numbers the next plane begins
    static constexpr int ARRANGED = PLANES * PLANE;
    static_assert(D % PLANES == 0 && BLOCK % TOKENS == 0);

    // How many tokens may be read where they lie; the others are read from a copy with zeros behind.
    static constexpr int whole(int count) {
        return TOKENS > 1 ? count / TOKENS * TOKENS : std::max(0, count - MARGIN);
    }
    struct Rest {
        int32_t words[std::max(TOKENS, MARGIN) * WORDS + BEYOND] = {};

        Rest(const int32_t* rows, int count) {
            const int first = whole(count);
            std::memcpy(words, rows + first * WORDS, (count - first) * WORDS * sizeof(int32_t));
        }
    };

    static INLINE Floats<N> plane(const Ints<N>& words, int number) {
        if constexpr (BITS == 32) {
            return (Floats<N>)words;
        } else {
            return __builtin_convertvector((words >> (BITS * number)) & ((1 << BITS) - 1), Floats<N>);
        }
    }

    // Which of the D numbers lies in a plane of a word: byte i holds number i in its lowest bits, above it number
    // i + D * BITS / 8.
    static constexpr int place(int plane, int word) {
        constexpr int IN_BYTE = BITS < 8 ? 8 / BITS : 1;
        return PLANES / IN_BYTE * word + plane / IN_BYTE + plane % IN_BYTE * (D / IN_BYTE);
    }

    // From the order of the numbers to that in which they are unpacked, for each token of a load, and back, summed.
    static void arrange(const float* numbers, float* arranged) {
        std::fill(arranged, arranged + ARRANGED, 0.0f);
        for (int plane = 0; plane < PLANES; ++plane) {
            for (int at = 0; at < WORDS * TOKENS; ++at) {
                arranged[plane * PLANE + at] = numbers[place(plane, at % WORDS)];
            }
        }
    }
    static void arrange_back(const float* arranged, float* numbers) {
        std::fill(numbers, numbers + D, 0.0f);
        for (int plane = 0; plane < PLANES; ++plane) {
            for (int at = 0; at < WORDS * TOKENS; ++at) {
                numbers[place(plane, at % WORDS)] += arranged[plane * PLANE + at];
            }
        }
    }
};

// scores[g][n] = row n . query[g]
template <int BITS, int D, int GROUP>
void multiply_keys_at(const int32_t* row, int count, const float* query, float* scores) {
    typedef Row<BITS, D> R;
    for (int n = 0; n < count; n += R::TOKENS, row += R::TOKENS * R::WORDS) {
        Floats<R::N> totals[GROUP] = {};
        UNROLLED for (int unit = 0; unit < R::UNITS; ++unit) {
            const Ints<R::N> words = load<Ints<R::N>>(row + unit * R::N);
            UNROLLED for (int plane = 0; plane < R::PLANES; ++plane) {
                const Floats<R::N> numbers = R::plane(words, plane);
                const float* own = query + plane * R::PLANE + unit * R::N;
                UNROLLED for (int g = 0; g < GROUP; ++g) {
                    totals[g] += numbers * load<Floats<R::N>>(own + g * R::ARRANGED);
                }
            }
        }
        UNROLLED for (int g = 0; g < GROUP; ++g) {
            constexpr int N = R::N / R::TOKENS;
            Floats<N> parts[R::TOKENS];
            std::memcpy(parts, &totals[g], sizeof(parts));
            UNROLLED for (int at = 0; at < R::TOKENS; ++at) scores[g * BLOCK + n + at] = sum<N>(parts[at]);
        }
    }
}

// The same of all; up to TOKENS - 1 more are written.
template <int BITS, int D, int GROUP>
void multiply_keys(const int32_t* rows, int count, const float* query, float* scores) {
    typedef Row<BITS, D> R;
    const int whole = R::whole(count);
    multiply_keys_at<BITS, D, GROUP>(rows, whole, query, scores);
    if (whole == count) return;
    const typename R::Rest rest(rows, count);
    multiply_keys_at<BITS, D, GROUP>(rest.words, count - whole, query, scores + whole);
}

// One token's weight, or those of the tokens of a load.
template <typename R>
INLINE Floats<R::N> spread(const float* weights) {
    Floats<R::N> spread = weights[0] - Floats<R::N>{};
    if constexpr (R::TOKENS > 1) {
        Ints<R::N> token;
        UNROLLED for (int lane = 0; lane < R::N; ++lane) token[lane] = lane / R::WORDS;
        UNROLLED for (int at = 1; at < R::TOKENS; ++at) spread = token == at ? weights[at] - Floats<R::N>{} : spread;
    }
    return spread;
}

// output[g] += the sum over n of weights[g][n] * row n
template <int BITS, int D, int GROUP>
void add_values_at(const int32_t* rows, int count, const float* weights, float* output) {
    typedef Row<BITS, D> R;
    constexpr int IN_REGISTERS = LANES == 16 ? 26 : 12;
    constexpr int AT_ONCE = std::max(1, std::min(R::PLANES, IN_REGISTERS / GROUP));
    for (int unit = 0; unit < R::UNITS; ++unit) {
        UNROLLED for (int first = 0; first < R::PLANES; first += AT_ONCE) {
            Floats<R::N> totals[AT_ONCE][GROUP] = {};
            const int32_t* row = rows + unit * R::N;
            for (int n = 0; n < count; n += R::TOKENS, row += R::TOKENS * R::WORDS) {
                const Ints<R::N> words = load<Ints<R::N>>(row);
                Floats<R::N> own[GROUP];
                UNROLLED for (int g = 0; g < GROUP; ++g) own[g] = spread<R>(weights + g * BLOCK + n);
                UNROLLED for (int at = 0; at < AT_ONCE; ++at) {
                    if (first + at >= R::PLANES) break;
                    const Floats<R::N> numbers = R::plane(words, first + at);
                    UNROLLED for (int g = 0; g < GROUP; ++g) totals[at][g] += numbers * own[g];
                }
            }
            UNROLLED for (int at = 0; at < AT_ONCE; ++at) {
                if (first + at >= R::PLANES) break;
                float* to = output + (first + at) * R::PLANE + unit * R::N;
                UNROLLED for (int g = 0; g < GROUP; ++g, to += R::ARRANGED) {
                    store(to, load<Floats<R::N>>(to) + totals[at][g]);
                }
            }
        }
    }
}

// The same of all; weights of TOKENS - 1 more are 0.
template <int BITS, int D, int GROUP>
void add_values(const int32_t* rows, int count, const float* weights, float* output) {
    typedef Row<BITS, D> R;
    const int whole = R::whole(count);
    add_values_at<BITS, D, GROUP>(rows, whole, weights, output);
    if (whole == count) return;
    const typename R::Rest rest(rows, count);
    add_values_at<BITS, D, GROUP>(rest.words, count - whole, weights + whole, output);
}

}  // namespace
}  // namespace compresskv

#ifndef __clang__
#pragma GCC pop_options
#endif
