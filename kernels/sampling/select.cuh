/* Selection without sorting, by a block of 1024 threads over one row of logits:
     cut_prefix       the cut behind the shortest prefix of the ranking that has a number of tokens, or a share of the mass
     first_reaching   the first token, in vocabulary order, at which a running sum reaches a goal
   Both narrow down 1024 bins a pass. A warp reads the row by tiles of 1024 tokens and skips those in which no token
   survives the cut so far. */
#pragma once
#include "sampling/row.cuh"
#include "sampling/scan.cuh"
#include "sampling/weights.cuh"

constexpr int TILE = 1024;  // tokens
constexpr int NUM_BINS = BLOCK_THREADS;

/* What a block shares. A row has at most as many tiles as the block has threads. */
struct Selection {
    ScanScratch scan;
    float tile_top[BLOCK_THREADS];  // no surviving token of the tile exceeds this logit
    uint64 tile_sum[BLOCK_THREADS];
    uint32 count[NUM_BINS], mass_low[NUM_BINS], mass_high[NUM_BINS];
    uint64 beyond, missing;
    uint32 bound[2];

    __device__ __forceinline__ void reset() {
        tile_top[threadIdx.x] = -minus_infinity_logit();
        __syncthreads();
    }

    __device__ __forceinline__ uint64 mass(int bin) const {
        return static_cast<uint64>(mass_high[bin]) << 32 | mass_low[bin];
    }

    /* Shared memory adds 32 bits at a time; whoever makes the low word wrap carries. */
    __device__ __forceinline__ void add(int bin, uint64 mass) {
        atomicAdd(&count[bin], 1u);
        const uint32 low = mass;
        if (mass == 0) return;
        const uint32 before = atomicAdd(&mass_low[bin], low);
        const uint32 high = static_cast<uint32>(mass >> 32) + (before + low < before);
        if (high) atomicAdd(&mass_high[bin], high);
    }
};

/* Bins of falling logits, either by octaves below the best (the first pass, since that spreads them) or by key. */
struct Bins {
    float from_octaves, bins_per_octave;
    uint32 low, high;  // keys, if bins_per_octave == 0
    int shift;

    static __device__ __forceinline__ Bins by_octaves(float from, float per_octave) {
        return {from, per_octave, 0, ~0u, 0};
    }

    static __device__ __forceinline__ Bins by_key(uint2 keys) {
        return {0.0f, 0.0f, keys.x, keys.y, max(0, 22 - __clz(keys.y - keys.x))};
    }

    __device__ __forceinline__ bool are_by_key() const { return bins_per_octave == 0.0f; }

    /* Of a token; negative if it lies before the first bin, NUM_BINS or more if behind the last. */
    template <typename Row>
    __device__ __forceinline__ int of(const Row& row, float x, float octaves) const {
        if (are_by_key()) {
            const uint32 key = row.key(x);
            return key > high ? -1 : key < low ? NUM_BINS : static_cast<int>((high - key) >> shift);
        }
        return octaves < from_octaves ? -1 : static_cast<int>(fminf((octaves - from_octaves) * bins_per_octave, NUM_BINS));
    }
};

/* Counts, by bin, the tokens that survive the cut, and sums their mass unless by_count; sums one of both behind the last
   bin. */
template <typename Row>
__device__ __forceinline__ void fill_bins(Selection& s, const Row& row, const Weights& weights, uint64 cut,
                                          const Bins& bins, bool by_count) {
    const int t = threadIdx.x, lane = t % WARP_SIZE, num_tiles = (row.vocab + TILE - 1) / TILE;
    __syncthreads();  // the bins of the pass before have been read
    s.count[t] = s.mass_low[t] = s.mass_high[t] = 0;
    if (t == 0) s.beyond = 0;
    __syncthreads();
    uint64 beyond = 0;
    const Survivors survivors(row, cut);
    const float from = bins.are_by_key() ? fmaxf(survivors.from, row.logit(bins.low)) : survivors.from;
    for (int tile = t / WARP_SIZE; tile < num_tiles; tile += BLOCK_THREADS / WARP_SIZE) {
        if (s.tile_top[tile] < from) continue;
        float top = minus_infinity_logit();
        row.visit(tile * TILE, (tile + 1) * TILE, from, [&](const float(&x)[Row::WIDTH], int first) {
#pragma unroll
            for (int j = 0; j < Row::WIDTH; ++j) {
                top = fmaxf(top, x[j]);
                const int bin = bins.of(row, x[j], weights.octaves_below(x[j]));
                if (bin < 0 || !survivors.include(x[j], first + j)) continue;
                const uint64 mass = by_count ? 0 : weights.of(x[j]);
                if (bin < NUM_BINS) {
                    s.add(bin, mass);
                } else {
                    beyond += by_count ? 1 : mass;
                }
            }
        });
        top = warp_max(top);
        __syncwarp();  // all lanes have read the tile's old top
        if (lane == 0 && !bins.are_by_key()) s.tile_top[tile] = top;
    }
    beyond = warp_sum(beyond);
    if (lane == 0) atomicAdd(&s.beyond, beyond);
    __syncthreads();
}

/* The keys [low, high] whose logits fall into a bin; for NUM_BINS, all keys behind the last bin. */
template <typename Row>
__device__ uint2 keys_of_bin(Selection& s, const Row& row, const Weights& weights, const Bins& bins, int bin) {
    if (bins.are_by_key()) {
        const uint32 high = bins.high - (static_cast<uint32>(bin) << bins.shift);
        const uint32 width = (1u << bins.shift) - 1;
        return make_uint2(high - bins.low > width ? high - width : bins.low, high);
    }
    __syncthreads();
    if (threadIdx.x < 2) {  // thread 0 finds the smallest key in bin or before it, thread 1 in the bin before or before that
        const int last = bin - threadIdx.x;
        uint32 low = 0, high = row.key(weights.best);
        while (low < high) {
            const uint32 middle = low + (high - low) / 2;
            const float x = row.logit(middle);
            // NaN lies below -inf and above the best
            const int at = x == x ? bins.of(row, x, weights.octaves_below(x)) : NUM_BINS + 1;
            if (at <= last) high = middle;
            else low = middle + 1;
        }
        s.bound[threadIdx.x] = low;
    }
    __syncthreads();
    const uint32 top = row.key(weights.best);
    return make_uint2(bin < NUM_BINS ? s.bound[0] : 0, bin > 0 ? s.bound[1] - 1 : top);
}

/* The smallest id at which the sum of measure(x, id) over the ids up to it reaches goal(total); 0 < goal <= total.
   Tokens below `from` measure nothing. */
template <typename Row, typename Measure, typename Goal>
__device__ __forceinline__ int first_reaching(Selection& s, const Row& row, float from, Measure measure, Goal goal) {
    const int t = threadIdx.x, num_tiles = (row.vocab + TILE - 1) / TILE;
    for (int tile = t / WARP_SIZE; tile < num_tiles; tile += BLOCK_THREADS / WARP_SIZE) {
        uint64 sum = 0;
        if (!(s.tile_top[tile] < from))
            row.visit(tile * TILE, (tile + 1) * TILE, from, [&](const float(&x)[Row::WIDTH], int first) {
#pragma unroll
                for (int j = 0; j < Row::WIDTH; ++j) sum += measure(x[j], first + j);
            });
        sum = warp_sum(sum);
        if (t % WARP_SIZE == 0) s.tile_sum[tile] = sum;
    }
    __syncthreads();
    const Scan tiles = scan_block(t < num_tiles ? s.tile_sum[t] : 0, s.scan);
    const uint64 target = goal(tiles.total);
    const Found tile = find_reaching(tiles, target, s.scan);
    const int id = tile.index * TILE + t;
    const Scan tokens = scan_block(id < row.vocab ? measure(row.at(id), id) : 0, s.scan);
    return tile.index * TILE + find_reaching(tokens, target - tile.before, s.scan).index;
}

/* The cut that leaves, of the tokens with this key that survive `cut`, the first `count` in vocabulary order. */
template <typename Row>
__device__ __forceinline__ uint64 cut_equals(Selection& s, const Row& row, uint64 cut, uint32 key, uint64 count) {
    const Survivors survivors(row, cut);
    const float logit = row.logit(key);
    const auto is_equal = [=](float x, int id) { return uint64(x == logit && survivors.include(x, id)); };
    return rank_of(key, first_reaching(s, row, logit, is_equal, [=](uint64) { return count; }));
}

/* The cut that leaves the shortest prefix of the ranking, among the tokens surviving `cut`, that has goal(total) of their
   total number (by_count) or mass; 0 < goal. */
template <typename Row, typename Goal>
__device__ __forceinline__ uint64 cut_prefix(Selection& s, const Row& row, const Weights& weights, uint64 cut,
                                             bool by_count, Goal goal) {
    Bins bins = Bins::by_octaves(0.0f, 64.0f);
    uint64 missing = 0;  // from the bins on
    for (bool is_first = true;; is_first = false) {
        if (threadIdx.x == 0) s.missing = missing;  // during the pass, registers are short
        fill_bins(s, row, weights, cut, bins, by_count);
        missing = s.missing;
        const Scan scan = scan_block(by_count ? s.count[threadIdx.x] : s.mass(threadIdx.x), s.scan);
        if (is_first) {
            const uint64 total = scan.total + s.beyond;
            missing = goal(total);
            if (missing >= total) return cut;
        }
        if (scan.total < missing) {  // the prefix ends behind the last bin
            missing -= scan.total;
            bins = is_first ? Bins::by_octaves(NUM_BINS / 64.0f, 32.0f)
                            : Bins::by_key(keys_of_bin(s, row, weights, bins, NUM_BINS));
            continue;
        }
        const Found found = find_reaching(scan, missing, s.scan);
        missing -= found.before;
        const uint2 keys = keys_of_bin(s, row, weights, bins, found.index);
        const uint32 count = s.count[found.index];
        const uint64 sum = by_count ? count : s.mass(found.index);
        if (count == 1 || sum == missing) return max(cut, rank_of(keys.x, -1));
        if (keys.x == keys.y) return cut_equals(s, row, cut, keys.x, (missing - 1) / (sum / count) + 1);
        bins = Bins::by_key(keys);
    }
}
