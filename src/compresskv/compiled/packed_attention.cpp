// Attention of one token over packed keys and values. packed_rows.cpp stands in front of this, and in front of both,
// SHAPES(CASE): CASE(bits of keys, of values, D, query heads of a KV head) of each kind of layer that a program has.
//
// A packed number is its vector's lowest, plus its code by the vector's step, plus its channel's centre. So a score is
// step * (codes . query) + low * sum(query) + centre . query, and the sum over values is taken apart in the same way.

#ifndef __clang__
#pragma GCC push_options
#pragma GCC optimize("O2", "fp-contract=fast")
#endif

namespace compresskv {
namespace {

constexpr int largest_divisor(int number, int limit) {
    int found = 1;
    for (int one = 2; one <= limit; ++one) {
        if (number % one == 0) found = one;
    }
    return found;
}

// Attention of the G queries of a KV head to some of its tokens.
template <int KEY_BITS, int VALUE_BITS, int D, int G>
struct State {
    static constexpr bool IS_PACKED = KEY_BITS != 32;
    static constexpr int GROUP = largest_divisor(G, 8);
    typedef Row<KEY_BITS, D> Keys;
    typedef Row<VALUE_BITS, D> Values;

    float highest[G];  // score
    float total[G];  // of the weights: 2 to the power of what a score is below the highest
    float lows[G];  // sum of the values' lowest numbers, by weights
    float output[G][Values::ARRANGED];  // sum of the values' codes by weights and steps

    State() {
        std::memset(this, 0, sizeof(*this));
        std::fill(highest, highest + G, LOWEST);
    }

    void raise(int g, float most) {
        if (most <= highest[g]) return;
        const float factor = std::exp2(highest[g] - most);
        highest[g] = most;
        total[g] *= factor;
        lows[g] *= factor;
        for (float& number : output[g]) number *= factor;
    }

    // From scores to weights, times the values' steps; 0 behind the last.
    void weigh(int g, int num, float* scores, const int32_t* keys, const int32_t* values, float query_sum,
               float offset) {
        const int padded = (num + LANES - 1) / LANES * LANES;
        Floats<LANES> most = Floats<LANES>{} + LOWEST, weights = {}, own_lows = {};
        for (int n = 0; n < padded; n += LANES) {
            Floats<LANES> own = load<Floats<LANES>>(scores + n);
            if constexpr (IS_PACKED) {
                const Ints<LANES> ranges = load<Ints<LANES>>(keys + n);
                own = own * widened<LANES>(ranges >> 16) + (widened<LANES>(ranges) * query_sum + offset);
            }
            for (int lane = std::max(0, num - n); lane < LANES; ++lane) own[lane] = LOWEST;
            store(scores + n, own);
            most = own > most ? own : most;
        }
        float highest_here = LOWEST;
        for (int lane = 0; lane < LANES; ++lane) highest_here = std::max(highest_here, most[lane]);
        raise(g, highest_here);
        for (int n = 0; n < padded; n += LANES) {
            Floats<LANES> own = power_of_two<LANES>(load<Floats<LANES>>(scores + n) - highest[g]);
            for (int lane = std::max(0, num - n); lane < LANES; ++lane) own[lane] = 0;
            weights += own;
            if constexpr (IS_PACKED) {
                const Ints<LANES> ranges = load<Ints<LANES>>(values + n);
                own_lows += own * widened<LANES>(ranges);
                own *= widened<LANES>(ranges >> 16);
            }
            store(scores + n, own);
        }
        total[g] += sum<LANES>(weights);
        lows[g] += sum<LANES>(own_lows);
    }

    // Queries are scaled for powers of two. A range: a vector's lowest number below, and its step above, in float16.
    void attend(const int32_t* keys, const int32_t* key_ranges, const int32_t* values, const int32_t* value_ranges,
                int64_t count, const float* query, const float* offsets) {
        float arranged[G * Keys::ARRANGED], sums[G] = {}, scores[GROUP * BLOCK];
        int32_t ranges[2][BLOCK] = {};
        for (int g = 0; g < G; ++g) {
            Keys::arrange(query + g * D, arranged + g * Keys::ARRANGED);
            for (int d = 0; d < D; ++d) sums[g] += query[g * D + d];
        }
        for (int64_t start = 0; start < count; start += BLOCK) {
            const int num = std::min<int64_t>(BLOCK, count - start);
            if constexpr (IS_PACKED) {
                std::memcpy(ranges[0], key_ranges + start, num * sizeof(int32_t));
                std::memcpy(ranges[1], value_ranges + start, num * sizeof(int32_t));
            }
            for (int first = 0; first < G; first += GROUP) {
                const float* own = arranged + first * Keys::ARRANGED;
                multiply_keys<KEY_BITS, D, GROUP>(keys + start * Keys::WORDS, num, own, scores);
                for (int at = 0; at < GROUP; ++at) {
                    const int g = first + at;
                    weigh(g, num, scores + at * BLOCK, ranges[0], ranges[1], sums[g], offsets[g]);
                }
                add_values<VALUE_BITS, D, GROUP>(values + start * Values::WORDS, num, scores, output[first]);
            }
        }
    }

    void add(const State& other) {
        for (int g = 0; g < G; ++g) {
            raise(g, other.highest[g]);
            const float factor = std::exp2(other.highest[g] - highest[g]);
            total[g] += factor * other.total[g];
            lows[g] += factor * other.lows[g];
            for (int at = 0; at < Values::ARRANGED; ++at) output[g][at] += factor * other.output[g][at];
        }
    }
};

struct Inputs {
    const float* query;  // (H_kv, G, D)
    const int32_t *key_codes, *key_ranges;  // (N, D * bits / 32) and (N)
    const uint16_t *key_centre, *key_scale;  // (H_kv, D)
    const int32_t *value_codes, *value_ranges;
    const uint16_t* value_centre;
    const float* rotation;  // (D, D)
    const float *tail_keys, *tail_values;  // (H_kv, T, D)
    const int64_t* bounds;  // (H_kv + 1): where in N each head's part begins, and the last one ends
    int64_t num_heads, num_vectors, tail_room, tail_count;
    float scaling;
};

// What multiplies a head's packed keys, of what multiplies them as they were given; and its product with their centre.
template <int BITS, int D>
float turned_query(const Inputs& in, int64_t head, const float* query, float* turned) {
    if constexpr (BITS >= 8) {
        std::memcpy(turned, query, D * sizeof(float));
        return 0;
    } else {
        float scaled[D], offset = 0;
        for (int d = 0; d < D; ++d) scaled[d] = query[d] * widened(in.key_scale[head * D + d]);
        constexpr int N = D % LANES == 0 ? LANES : D & -D;
        for (int to = 0; to < D; ++to) {
            Floats<N> totals = {};
            const float* row = in.rotation + to * D;
            for (int d = 0; d < D; d += N) totals += load<Floats<N>>(scaled + d) * load<Floats<N>>(row + d);
            const float total = sum<N>(totals);
            turned[to] = total;
            offset += total * widened(in.key_centre[head * D + to]);
        }
        return offset;
    }
}

// Of a query: the sum of values by weights that add up to `factor` of what they do in a state, added to `to`.
template <int KEY_BITS, int VALUE_BITS, int D, int G>
void add_output(const Inputs& in, const State<KEY_BITS, VALUE_BITS, D, G>& state, int64_t head, int g, float factor,
                float* to) {
    float numbers[D];
    Row<VALUE_BITS, D>::arrange_back(state.output[g], numbers);
    for (int d = 0; d < D; ++d) {
        numbers[d] = factor * (numbers[d] + state.lows[g]);
        if constexpr (VALUE_BITS < 8) numbers[d] += factor * state.total[g] * widened(in.value_centre[head * D + d]);
        if constexpr (VALUE_BITS >= 8) to[d] += numbers[d];
    }
    if constexpr (VALUE_BITS < 8) {
        constexpr int N = D % LANES == 0 ? LANES : D & -D;
        for (int from = 0; from < D; ++from) {
            const float* row = in.rotation + from * D;
            for (int d = 0; d < D; d += N) {
                store(to + d, load<Floats<N>>(to + d) + load<Floats<N>>(row + d) * numbers[from]);
            }
        }
    }
}

// output: (H_kv, G, D)
template <int KEY_BITS, int VALUE_BITS, int D, int G>
void attend(const Inputs& in, float* output) {
    int64_t num_threads = 1;
#ifdef _OPENMP
    if (in.num_vectors * D >= MANY) num_threads = omp_get_max_threads();
#endif
    const int64_t num_parts = (num_threads + in.num_heads - 1) / in.num_heads;
    std::vector<State<KEY_BITS, VALUE_BITS, D, G>> packed(in.num_heads * num_parts);
    std::vector<State<32, 32, D, G>> tails(in.num_heads);
    const float to_powers = in.scaling * 1.4426950408889634f;

#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t task = 0; task < in.num_heads * num_parts; ++task) {
        const int64_t head = task / num_parts, part = task % num_parts;
        float query[G * D], turned[G * D], offsets[G];
        for (int at = 0; at < G * D; ++at) query[at] = in.query[head * G * D + at] * to_powers;
        for (int g = 0; g < G; ++g) offsets[g] = turned_query<KEY_BITS, D>(in, head, query + g * D, turned + g * D);
        const int64_t count = in.bounds[head + 1] - in.bounds[head];
        const int64_t first = in.bounds[head] + count * part / num_parts;
        const int64_t last = in.bounds[head] + count * (part + 1) / num_parts;
        packed[task].attend(
            in.key_codes + first * Row<KEY_BITS, D>::WORDS, in.key_ranges + first,
            in.value_codes + first * Row<VALUE_BITS, D>::WORDS, in.value_ranges + first, last - first, turned, offsets
        );
        if (part == num_parts - 1) {
            const int64_t place = head * in.tail_room * D;
            tails[head].attend(
                (const int32_t*)(in.tail_keys + place), nullptr, (const int32_t*)(in.tail_values + place), nullptr,
                in.tail_count, query, offsets
            );
        }
    }

    std::fill(output, output + in.num_heads * G * D, 0.0f);
    for (int64_t head = 0; head < in.num_heads; ++head) {
        auto &own = packed[head * num_parts], *others = &own + 1, &tail = tails[head];
        for (int64_t part = 1; part < num_parts; ++part) own.add(*others++);
        for (int g = 0; g < G; ++g, output += D) {
            const float most = std::max(own.highest[g], tail.highest[g]);
            const float factor = std::exp2(own.highest[g] - most), tail_factor = std::exp2(tail.highest[g] - most);
            const float total = factor * own.total[g] + tail_factor * tail.total[g];
            add_output(in, own, head, g, factor / total, output);
            add_output(in, tail, head, g, tail_factor / total, output);
        }
    }
}

bool attend_any(int64_t key_bits, int64_t value_bits, int64_t dim, int64_t groups, const Inputs& in, float* output) {
#define CASE(K, V, D, G) \
    if (key_bits == K && value_bits == V && dim == D && groups == G) return attend<K, V, D, G>(in, output), true;
    SHAPES(CASE)
#undef CASE
    return false;
}

}  // namespace
}  // namespace compresskv

#ifndef __clang__
#pragma GCC pop_options
#endif
#undef UNROLLED
#undef INLINE

// What PyTorch's compiler calls: see `packed_attention` in packed_attention.py.
extern "C" __attribute__((visibility("hidden"))) AOTITorchError aoti_torch_cpu_packed_attention(
    AtenTensorHandle query, AtenTensorHandle key_codes, AtenTensorHandle key_ranges, AtenTensorHandle* key_centre,
    AtenTensorHandle* key_scale, AtenTensorHandle value_codes, AtenTensorHandle value_ranges,
    AtenTensorHandle* value_centre, AtenTensorHandle rotation, AtenTensorHandle tail_keys,
    AtenTensorHandle tail_values, AtenTensorHandle bounds, AtenTensorHandle tail_end, double scaling,
    AtenTensorHandle* result
) {
    try {
        bool is_fine = true;
        const auto data = [&](AtenTensorHandle of) {
            bool is_contiguous = false;
            void* found = nullptr;
            is_fine &= !aoti_torch_is_contiguous(of, &is_contiguous) && is_contiguous;
            is_fine &= !aoti_torch_get_data_ptr(of, &found);
            return found;
        };
        const auto floats = [&](AtenTensorHandle of) { return (const float*)data(of); };
        const auto words = [&](AtenTensorHandle of) { return (const int32_t*)data(of); };
        const auto halves = [&](AtenTensorHandle* of) { return of ? (const uint16_t*)data(*of) : nullptr; };
        const auto size = [&](AtenTensorHandle of, int64_t dim) {
            int64_t found = 1;
            is_fine &= !aoti_torch_get_size(of, dim, &found);
            return found;
        };
        const int64_t num_queries = size(query, 1), dim = size(query, 3), num_heads = size(tail_keys, 1);
        const int64_t key_bits = 8 * size(key_codes, 2) / dim, value_bits = 8 * size(value_codes, 2) / dim;
        const int64_t* end = (const int64_t*)data(tail_end);
        const compresskv::Inputs in = {
            floats(query), words(key_codes), words(key_ranges), halves(key_centre), halves(key_scale),
            words(value_codes), words(value_ranges), halves(value_centre), floats(rotation), floats(tail_keys),
            floats(tail_values), (const int64_t*)data(bounds), num_heads, size(key_codes, 1), size(tail_keys, 2),
            end ? *end + 1 : 0, (float)scaling};
        const int64_t sizes[] = {1, 1, num_queries, dim}, strides[] = {num_queries * dim, num_queries * dim, dim, 1};
        void* output = nullptr;
        is_fine = is_fine &&
                  !aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(),
                                            aoti_torch_device_type_cpu(), 0, result) &&
                  !aoti_torch_get_data_ptr(*result, &output) &&
                  compresskv::attend_any(key_bits, value_bits, dim, num_queries / num_heads, in, (float*)output);
        return is_fine ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
    } catch (...) {
        return AOTI_TORCH_FAILURE;
    }
}
