// The draw: the argmax of scaled scores + Gumbel noise over the tokens that top_k, top_p and min_p leave.
#pragma once

#include "noise.hpp"
#include "vocabulary.hpp"

namespace orca {
namespace ORCA_ISA {

constexpr int kBuckets = 1024;  // of scaled scores, where the end of top_p is looked for
constexpr float kSlack = 1e-3f;  // far more than float32 loses of a score in the race

// Changed scores stand in the logits for as long as this lives.
class Changes {
public:
    explicit Changes(const Draws& g) : g_(g) {
        each([&](float& place, std::int64_t n) { kept_.push_back({place, n}); });
        each([&](float& place, std::int64_t n) { place = g_.scores[n]; });
    }
    ~Changes() {
        std::size_t next = 0;
        each([&](float& place, std::int64_t) { place = kept_[next++].value; });
    }
    Changes(const Changes&) = delete;
    Changes& operator=(const Changes&) = delete;

private:
    template <class Work>
    void each(const Work& work) {
        for (std::int64_t i = 0; i < g_.count; ++i) {
            const Draw& draw = g_.draws[i];
            for (std::int64_t n = draw.first; n < draw.first + draw.count; ++n)
                work(g_.logits[draw.row * g_.vocab + g_.ids[n]], n);
        }
    }

    const Draws& g_;
    std::vector<Found> kept_;
};

// A draw that noise decides. last: the last token that may be drawn, in the order of `ahead`.
struct Race {
    const Draw* draw;
    std::int64_t* token;  // the likeliest, until it is known who won
    View view;
    Found last;
    double wanted, before;  // of top_p: the mass to reach; the mass ahead of the values under consideration
};

inline std::vector<View> views_of(const std::vector<Race*>& races) {
    std::vector<View> views;
    for (const Race* race : races) views.push_back(race->view);
    return views;
}

inline double mass_of(float value) {
    float out[16];
    store(out, exp(set1(value)));
    return out[0];
}

// The one that makes the running sum of masses reach what is wanted; the last if none does.
inline Found reaching(const std::vector<Found>& sorted, double run, double wanted) {
    for (const Found& one : sorted) {
        run += mass_of(one.value);
        if (run >= wanted) return one;
    }
    return sorted.back();
}

inline void limit_to_top_k(Pool& pool, const std::vector<Race*>& races, std::int64_t vocab) {
    auto found = likeliest(pool, views_of(races), vocab, [&](std::size_t row) { return races[row]->draw->top_k; });
    pool.run(static_cast<std::uint32_t>(races.size()), [&](std::uint32_t row, int) {
        Race& race = *races[row];
        race.last = found[row].back();
        if (race.draw->top_p >= 1.0) return;
        std::sort(found[row].begin(), found[row].end(), ahead);
        double total = 0.0;
        for (const Found& one : found[row]) total += mass_of(one.value);
        race.last = reaching(found[row], 0.0, race.draw->top_p * total);
    });
}

// Of equal width, from a peak of 0 down to `least`.
struct Buckets {
    float least, factor;

    explicit Buckets(float least) : least(least), factor(kBuckets / least) {}

    int of(float value) const { return std::min(kBuckets - 1, static_cast<int>(value * factor)); }
    // No value of a bucket is outside.
    Range range(int bucket) const {
        const float low = least * (1.0f + 1e-5f) * (bucket + 1) / kBuckets;
        return {std::max(least, low), least * (1.0f - 1e-5f) * bucket / kBuckets};
    }
};

// The bucket in which top_p ends.
struct Chosen {
    int bucket;
};

// Masses are summed in buckets; only the values of the bucket in which top_p ends are sorted.
//
// What lies below the last bucket has less mass in all than top_p leaves out. A value's bucket never sinks as the value
// rises, whatever is rounded.
inline void limit_to_top_p(Pool& pool, const std::vector<Race*>& races, std::int64_t vocab) {
    const std::vector<View> views = views_of(races);
    const std::vector<Sum> masses = find_masses(pool, views, vocab);
    std::vector<Buckets> buckets;
    for (std::size_t row = 0; row < races.size(); ++row) {
        const double top_p = races[row]->draw->top_p, total = masses[row].value;
        races[row]->wanted = top_p * total;
        buckets.emplace_back(std::log((1.0 - top_p) * total / static_cast<double>(vocab)) - 1.0);
    }
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    double* const sums = static_cast<double*>(pool.shared(races.size() * pieces * kBuckets * sizeof(double)));
    by_pieces(pool, races.size(), vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        double* const of = sums + item * kBuckets;
        std::fill_n(of, kBuckets, 0.0);
        const View view = views[row];
        const Buckets numbers = buckets[row];
        for (std::int64_t i = begin; i < end; i += 16) {
            const Vec x = view.at(i, end - i);
            unsigned bits = at_least(x, set1(numbers.least));
            if (bits == 0) continue;
            float values[16], mass[16];
            store(values, x);
            store(mass, exp(x));
            for (; bits != 0; bits &= bits - 1) {
                const int lane = __builtin_ctz(bits);
                of[numbers.of(values[lane])] += mass[lane];
            }
        }
    });
    std::vector<Chosen> chosen(races.size());
    std::vector<Range> ranges(races.size());
    pool.run(static_cast<std::uint32_t>(races.size()), [&](std::uint32_t row, int) {
        Race& race = *races[row];
        race.before = 0.0;
        ranges[row] = {__builtin_inff(), __builtin_inff()};
        for (int bucket = 0; bucket < kBuckets; ++bucket) {
            double mass = 0.0;
            for (std::int64_t piece = 0; piece < pieces; ++piece)
                mass += sums[(row * pieces + piece) * kBuckets + bucket];
            if (race.before + mass >= race.wanted) {
                chosen[row].bucket = bucket;
                ranges[row] = buckets[row].range(bucket);
                break;
            }
            race.before += mass;
        }
    });
    auto found = collect(pool, views, vocab, ranges, [&](std::size_t row, float value) {
        return buckets[row].of(value) == chosen[row].bucket;
    });
    pool.run(static_cast<std::uint32_t>(races.size()), [&](std::uint32_t row, int) {
        if (found[row].empty()) return;  // rounding alone keeps the mass from being reached: all may be drawn
        std::sort(found[row].begin(), found[row].end(), ahead);
        races[row]->last = reaching(found[row], races[row]->before, races[row]->wanted);
    });
}

// A score with its noise.
struct Score {
    double value;
    std::int64_t id;

    void improve(const Score& other) {
        if (other.value > value || (other.value == value && other.id < id)) *this = other;
    }
};

// With -log(u) >= 1 - u, value - log(-log(u)) can only reach the best score if 1 - u <= e ** (value - best). That is
// cheap to see in float32, and true of few: those are reckoned exactly.
inline Score best_of(const Race& race, std::int64_t begin, std::int64_t end) {
    const View view = race.view;
    const std::uint64_t key = race.draw->key;
    const Vec lowest = set1(race.last.value);
    Score best{gumbel(counter(key, *race.token)), *race.token};
    Vec rival = set1(static_cast<float>(best.value) - kSlack);
    Vec needed = max(lowest, rival - set1(kHighest));
    for (std::int64_t i = begin; i < end; i += 16) {
        const Vec x = view.at(i, end - i);
        unsigned bits = at_least(x, needed);
        if (bits == 0) continue;
        bits &= at_least(exp(x - rival), complements(counter(key, i)));
        if (bits == 0) continue;
        for (bits &= lanes(end - i); bits != 0; bits &= bits - 1) {
            const Found one{view[i + __builtin_ctz(bits)], i + __builtin_ctz(bits)};
            if (!ahead(race.last, one)) best.improve({one.value + gumbel(counter(key, one.id)), one.id});
        }
        rival = set1(static_cast<float>(best.value) - kSlack);
        needed = max(lowest, rival - set1(kHighest));
    }
    return best;
}

inline void run(Pool& pool, const std::vector<Race>& races, std::int64_t vocab) {
    const std::int64_t pieces = ceil_div(vocab, kPiece);
    std::vector<Score> best(races.size() * pieces);
    by_pieces(pool, races.size(), vocab, [&](std::size_t row, std::size_t item, std::int64_t begin, std::int64_t end) {
        best[item] = best_of(races[row], begin, end);
    });
    for (std::size_t row = 0; row < races.size(); ++row) {
        Score winner = best[row * pieces];
        for (std::int64_t piece = 1; piece < pieces; ++piece) winner.improve(best[row * pieces + piece]);
        *races[row].token = winner.id;
    }
}

inline void draw(Pool& pool, const Draws& g) {
    const std::lock_guard<std::mutex> lock(pool.mutex());
    const Changes changes(g);
    std::vector<View> rows;
    for (std::int64_t i = 0; i < g.count; ++i)
        rows.push_back({g.logits + g.draws[i].row * g.vocab, 0.0f, 1.0f, 0.0f, g.draws[i].allowed});
    const std::vector<Found> peaks = find_peaks(pool, rows, g.vocab);
    std::vector<Race> races;
    for (std::int64_t i = 0; i < g.count; ++i) {
        const Draw& draw = g.draws[i];
        const bool sound = std::isfinite(peaks[i].value);
        g.tokens[i] = sound ? peaks[i].id : -1;
        if (!sound || draw.temperature == 0.0f) continue;
        // the peak becomes 0, so that no temperature, however small, overflows
        const View view{rows[i].logits, peaks[i].value, draw.temperature, 0.0f, draw.allowed};
        races.push_back({&draw, g.tokens + i, view, {-__builtin_inff(), g.vocab}, 0.0, 0.0});
    }
    std::vector<Race*> by_k, by_p;
    for (Race& race : races) {
        if (race.draw->top_k > 0 && race.draw->top_k < g.vocab) {
            by_k.push_back(&race);
        } else if (race.draw->top_p < 1.0) {
            by_p.push_back(&race);
        }
    }
    if (!by_k.empty()) limit_to_top_k(pool, by_k, g.vocab);
    if (!by_p.empty()) limit_to_top_p(pool, by_p, g.vocab);
    for (Race& race : races)
        if (race.draw->least > race.last.value) race.last = {race.draw->least, g.vocab};
    run(pool, races, g.vocab);
}

}  // namespace ORCA_ISA
}  // namespace orca
