/* Decode attention's work in units of UNIT keys of one (sequence, head), and its distribution over blocks. Heads here are
   key/value heads times blocks of query rows ("column blocks"): one unit is a piece of K and V and the rows it serves.

       sequence 0, head 0 | sequence 0, head 1 | … | sequence 1, head 0 | …            total units
       block 0      | block 1      | block 2      | …  shares differ by at most one unit */
#pragma once
#include "attention.cuh"

/* A place in the list of units: one unit of a sequence and a head, heads counting key/value heads times column blocks. */
template <int UNIT>
struct Cursor {
    int seq, head, unit, begin_unit, end_unit;
    Sequence sequence;

    __device__ __forceinline__ Cursor(const AttentionInputs& in, const Located& at) : seq(at.seq), sequence(in, at.seq) {
        set_range(in);
        head = at.offset / (end_unit - begin_unit);
        unit = begin_unit + at.offset % (end_unit - begin_unit);
    }

    static __device__ __forceinline__ int num_units(const AttentionInputs& in, const Sequence& s) {
        if (!s.is_served(in) || s.context_len <= 0) return 0;
        return ceil_units(s.context_len) - s.begin_key(0, in.window) / UNIT;
    }

    static __device__ __forceinline__ int ceil_units(int keys) { return (keys + UNIT - 1) / UNIT; }

    __device__ __forceinline__ void set_range(const AttentionInputs& in) {
        begin_unit = sequence.begin_key(0, in.window) / UNIT;
        end_unit = ceil_units(sequence.context_len);
    }

    /* There must be a next unit. */
    __device__ __forceinline__ void advance(const AttentionInputs& in, int num_heads) {
        if (++unit < end_unit) return;
        if (++head == num_heads) {
            head = 0;
            do sequence = Sequence(in, ++seq);
            while (num_units(in, sequence) == 0);
            set_range(in);
        }
        unit = begin_unit;
    }

    __device__ __forceinline__ int first_key() const { return unit * UNIT; }
};

/* How total units are dealt out to blocks: evenly, in order. A border that falls one unit beside that of a segment moves
   onto it, since a split costs about as much as a unit. Blocks left without units do nothing. */
struct Shares {
    int total, num_blocks;

    __device__ __forceinline__ explicit Shares(int total) : total(total), num_blocks(max(1, min(total, (int)gridDim.x))) {}

    /* The first unit of a block's share before borders move; total for blocks that get none. */
    __device__ __forceinline__ int border(int block) const {
        return min((int64)total * block / num_blocks, (int64)total);
    }

    /* How far a border moves that lies `offset` units behind the begin of a segment of `length`. */
    static __device__ __forceinline__ int move(int offset, int length) {
        return offset == 1 ? -1 : offset > 0 && offset == length - 1 ? 1 : 0;
    }

    /* The last block whose border is at or before a unit. */
    __device__ __forceinline__ int last_block_before(int unit) const {
        return (((int64)unit + 1) * num_blocks - 1) / total;
    }
};

/* The units [begin, end) that a block has of a sequence and head, whose units are [whole_begin, whole_end). */
struct Segment {
    int kv_head, first_column, num_columns;  // a block of query rows: tokens x heads of the group
    int whole_begin, whole_end, begin, end;
    int64 index;  // of the sequence and head
    Sequence sequence;

    template <int UNIT>
    __device__ __forceinline__ Segment(const AttentionInputs& in, const Cursor<UNIT>& at, int column_blocks, int columns,
                                       int begin, int whole_begin)
        : kv_head(at.head / column_blocks), first_column(at.head % column_blocks * columns),
          num_columns(min(columns, in.group() * at.sequence.query_len - first_column)), whole_begin(whole_begin),
          whole_end(whole_begin + at.end_unit - at.begin_unit), begin(begin), end(begin),
          index((int64)at.seq * in.num_kv_heads * column_blocks + at.head), sequence(at.sequence) {}

    /* The blocks that share it, if several do: borders next to its own have moved there. */
    __device__ __forceinline__ int first_block(const Shares& s) const { return s.last_block_before(whole_begin + 1); }
    __device__ __forceinline__ int last_block(const Shares& s) const { return s.last_block_before(whole_end - 2); }

    __device__ __forceinline__ bool starts_here() const { return begin == whole_begin; }
    __device__ __forceinline__ bool is_whole() const { return begin == whole_begin && end == whole_end; }

    /* The output of a query row (token x head of the group). */
    template <typename T, int D>
    __device__ __forceinline__ T* out_row(const AttentionInputs& in, int column) const {
        const int row = first_column + column, group = in.group();
        const int64 token = sequence.first_token + row / group;
        return static_cast<T*>(in.out) + (token * in.num_heads + kv_head * group + row % group) * D;
    }
};
