// All steps of the CUDA pipeline except the network, for one device.
//
// A kernel is a body that processes index `i` of `n`, with its arguments in a struct of the same
// layout as its `ctypes.Structure` in kernels.py. The file also compiles as host C++, where the
// bodies run in a loop, so that tests on the host check the code that the device runs. Compiled
// without fused multiply-add, its sums equal those of the numpy pipeline bit for bit.
//
// Indices have 32 bits, as 64-bit division costs a GPU more than most bodies; offsets have 64 bits.
// Where an index stands for several neighbours along Z, a thread has their loads in flight together.
// Arrays are C-contiguous: images (C, X, Y, Z), logits (windows, K, x, y, z). The comment of each
// kernel names its numpy reference, and B, the minimum number of bytes moved per voxel or element.

#ifdef __CUDACC__

#define KERNEL(name, Args)                                                              \
    __device__ void name##_body(const Args &a, unsigned i);                             \
    extern "C" __global__ void name(unsigned n, const __grid_constant__ Args a) {       \
        unsigned i = blockIdx.x * blockDim.x + threadIdx.x;                             \
        if (i < n) name##_body(a, i);                                                   \
    }                                                                                   \
    __device__ void name##_body(const Args &a, unsigned i)
#define FUNCTION __device__ inline
#define UNROLLED _Pragma("unroll")
#define EXP expf

// Relaxed atomic accesses, for memory that other threads of the kernel change.
FUNCTION int load(const int *p) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
FUNCTION void store(int *p, int value) {
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
FUNCTION unsigned short half_bits(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
FUNCTION unsigned short half_bits_of(double value) {
    unsigned short bits;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(bits) : "d"(value));
    return bits;
}
FUNCTION float half_value(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// Copies B bytes between addresses that are multiples of B.
template <int B> FUNCTION void copy(void *to, const void *from) {
    if constexpr (B == 16) *(uint4 *)to = *(const uint4 *)from;
    else if constexpr (B == 8) *(uint2 *)to = *(const uint2 *)from;
    else *(unsigned *)to = *(const unsigned *)from;
}

#else

#include <cmath>
#include <cstring>

#define __align__(bytes) alignas(bytes)

#define KERNEL(name, Args)                                                              \
    static void name##_body(const Args &a, unsigned i);                                 \
    extern "C" void name(unsigned n, const Args *a) {                                   \
        for (unsigned i = 0; i < n; ++i) name##_body(*a, i);                            \
    }                                                                                   \
    static void name##_body(const Args &a, unsigned i)
#define FUNCTION static inline
#define UNROLLED
#define EXP std::exp

FUNCTION int load(const int *p) { return *p; }
FUNCTION void store(int *p, int value) { *p = value; }
FUNCTION int atomicAdd(int *p, int value) { int old = *p; *p += value; return old; }
FUNCTION int atomicMin(int *p, int value) { int old = *p; if (value < old) *p = value; return old; }
FUNCTION int atomicMax(int *p, int value) { int old = *p; if (value > old) *p = value; return old; }

FUNCTION unsigned short half_bits(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
FUNCTION unsigned short half_bits_of(double value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
FUNCTION float half_value(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}
template <int B> FUNCTION void copy(void *to, const void *from) { std::memcpy(to, from, B); }

#endif

// Copies N elements; in pieces of up to 16 bytes if both addresses allow it.
template <int N, class T> FUNCTION void copy_all(T *to, const T *from) {
    const int size = (int)(N * sizeof(T)), piece = size % 16 == 0 ? 16 : size % 8 == 0 ? 8 : 4;
    if constexpr (size % piece == 0)
        if ((((unsigned long long)to | (unsigned long long)from) & (piece - 1)) == 0) {
            for (int k = 0; k < size; k += piece)
                copy<piece>((char *)to + k, (const char *)from + k);
            return;
        }
    for (int k = 0; k < N; ++k) to[k] = from[k];
}

struct Extent { int x, y, z; };

FUNCTION Extent place(unsigned i, Extent of) {
    unsigned row = i / of.z;
    return Extent{(int)(row / of.y), (int)(row % of.y), (int)(i % of.z)};
}
FUNCTION long long index(Extent at, Extent of) {
    return ((long long)at.x * of.y + at.y) * of.z + at.z;
}
FUNCTION long long voxels_of(Extent shape) { return (long long)shape.x * shape.y * shape.z; }
FUNCTION bool inside(Extent at, Extent of) {
    return at.x >= 0 && at.y >= 0 && at.z >= 0 && at.x < of.x && at.y < of.y && at.z < of.z;
}
FUNCTION Extent plus(Extent a, Extent b) { return Extent{a.x + b.x, a.y + b.y, a.z + b.z}; }
FUNCTION Extent minus(Extent a, Extent b) { return Extent{a.x - b.x, a.y - b.y, a.z - b.z}; }
FUNCTION Extent largest(Extent a, Extent b) {
    return Extent{a.x > b.x ? a.x : b.x, a.y > b.y ? a.y : b.y, a.z > b.z ? a.z : b.z};
}
// The voxel that follows another in memory.
FUNCTION Extent next(Extent at, Extent of) {
    if (++at.z < of.z) return at;
    return ++at.y < of.y ? Extent{at.x, at.y, 0} : Extent{at.x + 1, 0, 0};
}
FUNCTION int axis(Extent s, int which) { return which == 0 ? s.x : which == 1 ? s.y : s.z; }

// Memory layout of a volume, with any order and direction of the axes.
struct Layout {
    long long offset, x, y, z;  // in elements
};
FUNCTION long long element(Layout s, Extent at) {
    return s.offset + at.x * s.x + at.y * s.y + at.z * s.z;
}

// A flip or quarter turn (geometry.py): axis j of the turned image is axis `axes[j]` of the image,
// reversed if `flips[j]` is set.
struct AxisTransform {
    int axes[3];
    int flips[3];
};
FUNCTION Extent turned_shape(AxisTransform t, Extent shape) {
    return Extent{axis(shape, t.axes[0]), axis(shape, t.axes[1]), axis(shape, t.axes[2])};
}
FUNCTION Extent from_turned(AxisTransform t, Extent at, Extent shape) {
    Extent turned = turned_shape(t, shape);
    int source[3] = {0, 0, 0};
    for (int j = 0; j < 3; ++j) {
        int value = t.flips[j] ? axis(turned, j) - 1 - axis(at, j) : axis(at, j);
        for (int k = 0; k < 3; ++k)  // a constant index keeps `source` in registers
            if (t.axes[j] == k) source[k] = value;
    }
    return Extent{source[0], source[1], source[2]};
}
// Elements from a voxel of the image to the one that follows it along Z of the turned image.
FUNCTION long long step_along_turned_z(AxisTransform t, Extent shape) {
    long long step = t.axes[2] == 0 ? (long long)shape.y * shape.z : t.axes[2] == 1 ? shape.z : 1;
    return t.flips[2] ? -step : step;
}
FUNCTION Extent to_turned(AxisTransform t, Extent at, Extent shape) {
    Extent turned = turned_shape(t, shape);
    int target[3];
    for (int j = 0; j < 3; ++j) {
        int value = axis(at, t.axes[j]);
        target[j] = t.flips[j] ? axis(turned, j) - 1 - value : value;
    }
    return Extent{target[0], target[1], target[2]};
}

// A window plan (windows.py): the first voxels of the windows along each axis, in ascending order.
struct Tiling {
    const int *starts;             // `count.x` along X, then `count.y` along Y and `count.z` along Z
    Extent window, count, stride;  // `stride` is the largest distance between neighbours
    Extent pad;                    // padding in front of the turned image
};
FUNCTION const int *starts_y(const Tiling &t) { return t.starts + t.count.x; }
FUNCTION const int *starts_z(const Tiling &t) { return t.starts + t.count.x + t.count.y; }
FUNCTION Extent start_of(const Tiling &t, int window) {
    Extent which = place(window, t.count);
    return Extent{t.starts[which.x], starts_y(t)[which.y], starts_z(t)[which.z]};
}
// Index of a window along an axis, before which none contains `at`; at a fixed stride, this one may.
FUNCTION int first_along(int at, int window, int stride) {
    return at < window ? 0 : (at - window) / stride + 1;
}
// Calls `visit(window, position in it)` for all windows that contain any of `along` voxels from `at` on
// along Z, in the plan's order. The position is that of the first voxel, which may lie in front.
template <class Visit>
FUNCTION void for_windows_around(const Tiling &t, Extent at, int along, Visit visit) {
    for (int x = first_along(at.x, t.window.x, t.stride.x); x < t.count.x; ++x) {
        int in_x = at.x - t.starts[x];
        if (in_x < 0) break;
        if (in_x >= t.window.x) continue;
        for (int y = first_along(at.y, t.window.y, t.stride.y); y < t.count.y; ++y) {
            int in_y = at.y - starts_y(t)[y];
            if (in_y < 0) break;
            if (in_y >= t.window.y) continue;
            for (int z = first_along(at.z, t.window.z, t.stride.z); z < t.count.z; ++z) {
                int in_z = at.z - starts_z(t)[z];
                if (in_z + along <= 0) break;
                if (in_z >= t.window.z) continue;
                visit((x * t.count.y + y) * t.count.z + z, Extent{in_x, in_y, in_z});
            }
        }
    }
}

const int SCANNED = 16;  // voxels per index of the scans
const int SPREAD = 16;   // counters per value: a GPU adds to one sector of memory at a time

// Counts of the nonzero values of one channel, and their bounding box in memory; one index per 16
// voxels, in memory order. Reference: numpy.bincount, foreground.foreground_box. B: 2.
struct ScanArgs {
    const void *volume;  // int16, or fp32
    int *counts;         // (65536, 16), indexed by value + 32768, or by the upper half of the key
    int *box;            // largest distance of a voxel from the end along X, Y, Z, and from the start
    Extent shape;        // of the memory
};
template <class T, class Bin> FUNCTION void scan_voxels(const ScanArgs &a, unsigned i, Bin bin_of) {
    long long voxels = voxels_of(a.shape), first = (long long)i * SCANNED;
    int count = voxels - first < SCANNED ? (int)(voxels - first) : SCANNED;
    const T *volume = (const T *)a.volume + first;
    __align__(16) T values[SCANNED];
    if (count == SCANNED) copy_all<SCANNED>(values, volume);
    else
        for (int k = 0; k < SCANNED; ++k) values[k] = k < count ? volume[k] : (T)0;
    Extent at = place((unsigned)first, a.shape);
    Extent before = {0, 0, 0}, behind = {0, 0, 0};
    int *counts = a.counts + i % SPREAD;
    int last = -1, run = 0;  // equal neighbours are counted by one addition
    for (int k = 0; k < SCANNED; ++k) {
        if (values[k] != 0) {
            int bin = bin_of(values[k]);
            if (bin != last && run) atomicAdd(counts + last * SPREAD, run);
            run = bin == last ? run + 1 : 1;
            last = bin;
            before = largest(before, minus(a.shape, at));
            behind = largest(behind, plus(at, Extent{1, 1, 1}));
        }
        at = next(at, a.shape);
    }
    if (!run) return;
    atomicAdd(counts + last * SPREAD, run);
    for (int j = 0; j < 3; ++j) {  // most voxels only read the box and change nothing
        if (axis(before, j) > load(a.box + j)) atomicMax(a.box + j, axis(before, j));
        if (axis(behind, j) > load(a.box + 3 + j)) atomicMax(a.box + 3 + j, axis(behind, j));
    }
}
KERNEL(scan, ScanArgs) {
    scan_voxels<short>(a, i, [](short value) { return value + 32768; });
}

// Order-preserving key of a float: for both signs, the larger float has the larger key.
FUNCTION unsigned key_of(float value) {
    union { float value; unsigned bits; } both;
    both.value = value;
    return both.bits >> 31 ? ~both.bits : both.bits | 0x80000000u;
}

// The same as `scan` for floats: counts of the upper halves of their keys. With the counts of some
// lower halves (`refine`) they yield any order statistic (radix selection: Alabi et al., "Fast
// k-selection algorithms for graphics processing units", JEA 17, 2012). B: 4.
KERNEL(scan_float, ScanArgs) {
    scan_voxels<float>(a, i, [](float value) { return (int)(key_of(value) >> 16); });
}

// Adds the counters of each value. Reference: numpy.sum. B: 68.
struct SumCountsArgs {
    const int *counts;  // (65536, 16)
    int *sums;          // 65536
};
KERNEL(sum_counts, SumCountsArgs) {
    __align__(16) int counts[SPREAD];
    copy_all<SPREAD>(counts, a.counts + (long long)i * SPREAD);
    int sum = 0;
    for (int k = 0; k < SPREAD; ++k) sum += counts[k];
    a.sums[i] = sum;
}

// Counts of the lower halves of keys whose upper half was chosen. Reference: numpy.unique. B: 4.
struct RefineArgs {
    const float *volume;
    const int *chosen;  // 65536: row in `counts` of each chosen upper half, -1 for the others
    int *counts;        // rows of 65536
};
KERNEL(refine, RefineArgs) {
    float value = a.volume[i];
    if (value == 0) return;
    unsigned key = key_of(value);
    int which = a.chosen[key >> 16];
    if (which >= 0) atomicAdd(a.counts + which * 65536 + (key & 65535), 1);
}

// Partial sums over every `lanes`-th voxel: of the nonzero values, or of their squared deviations
// from the mean. The host adds them in a fixed order. Reference: numpy.sum. B: 4 per voxel.
struct MomentArgs {
    const float *volume;
    double *sums;  // one per index
    double mean;
    long long voxels;
    int lanes, squared;
};
KERNEL(moment, MomentArgs) {
    double sum = 0;
    for (long long j = i; j < a.voxels; j += a.lanes) {
        double value = a.volume[j];
        if (value == 0) continue;
        sum += a.squared ? (value - a.mean) * (value - a.mean) : value;
    }
    a.sums[i] = sum;
}

// Maps one channel of the box by a lookup table (z-score and histogram matching; normalise.py).
// Reference: normalise.normalise_channel. B: 6.
struct NormaliseArgs {
    const short *volume;
    const float *table;         // 65536, indexed by value + 32768
    const unsigned char *mask;  // (X, Y, Z): voxels outside are 0; null for none
    float *image;               // (X, Y, Z) of the box
    Layout layout;
    Extent shape, origin;  // of the box
};
KERNEL(normalise, NormaliseArgs) {
    Extent source = plus(place(i, a.shape), a.origin);
    bool outside = a.mask && !a.mask[i];
    a.image[i] = outside ? 0.0f : a.table[a.volume[element(a.layout, source)] + 32768];
}

// The same for floats, by evaluating the piecewise linear curve. Reference: numpy.interp. B: 8.
struct NormaliseFloatArgs {
    const float *volume;
    const double *knots;        // `count` intensities, then their values
    const unsigned char *mask;  // as in NormaliseArgs
    float *image;
    Layout layout;
    Extent shape, origin;
    int count, keep_zero;
};
KERNEL(normalise_float, NormaliseFloatArgs) {
    double value = a.volume[element(a.layout, plus(place(i, a.shape), a.origin))];
    const double *x = a.knots, *y = a.knots + a.count;
    int last = a.count - 2, j = 0;
    while (j < last && value >= x[j + 1]) ++j;
    double slope = (y[j + 1] - y[j]) / (x[j + 1] - x[j]);
    bool beyond = value > x[last + 1];
    double mapped = slope * (value - x[beyond ? j + 1 : j]) + y[beyond ? j + 1 : j];
    bool outside = (a.mask && !a.mask[i]) || (a.keep_zero && value == 0);
    a.image[i] = outside ? 0.0f : (float)mapped;
}

// A row of a window along Z: where it lies in the image, and which of its voxels the image has.
struct Row {
    long long first, step;  // element of the first voxel, and elements from one to the next
    int begin, end;         // voxels within the image; the others are padding
};
FUNCTION Row row_of(const Tiling &t, AxisTransform transform, Extent shape, int window, Extent within) {
    Extent turned = minus(plus(start_of(t, window), within), t.pad);
    Extent of = turned_shape(transform, shape);
    bool outside = turned.x < 0 || turned.y < 0 || turned.x >= of.x || turned.y >= of.y;
    int begin = -turned.z, end = of.z - turned.z;
    return Row{index(from_turned(transform, turned, shape), shape), step_along_turned_z(transform, shape),
               begin > 0 ? begin : 0, outside ? 0 : end};
}

// The same row, from its last voxel to its first; a row has `size` voxels.
FUNCTION Row reversed(Row row, int size) {
    return Row{row.first + (size - 1) * row.step, -row.step, size - row.end, size - row.begin};
}
// Voxel of a mirror image of a window, reversed along the axes that are set in `mirror`.
FUNCTION Extent mirrored(Extent at, Extent mirror, Extent window) {
    return Extent{mirror.x ? window.x - 1 - at.x : at.x, mirror.y ? window.y - 1 - at.y : at.y,
                 mirror.z ? window.z - 1 - at.z : at.z};
}

// Flags the windows of the turned, padded image that are not all 0; the others skip the network.
// One index per row of a window along Z; a row of a flagged window is not looked at.
// Reference: numpy.any per window. B: 4C.
struct OccupyArgs {
    const float *image;  // (C, X, Y, Z)
    int *occupied;       // per window
    Extent shape;         // of the image
    Tiling tiling;
    AxisTransform transform;
    int channels;
};
KERNEL(occupy, OccupyArgs) {
    Extent window = a.tiling.window;
    unsigned rows = (unsigned)window.x * window.y;
    int which = (int)(i / rows);
    Extent within = {(int)(i % rows) / window.y, (int)(i % rows) % window.y, 0};
    Row row = row_of(a.tiling, a.transform, a.shape, which, within);
    long long voxels = voxels_of(a.shape);
    int end = row.end < window.z ? row.end : window.z;
    for (int z = row.begin; z < end; ++z) {
        if (z % 8 == 0 && load(a.occupied + which)) return;
        for (int c = 0; c < a.channels; ++c)
            if (a.image[c * voxels + row.first + z * row.step] != 0) {
                store(a.occupied + which, 1);
                return;
            }
    }
}

const int GATHERED = 8;  // voxels along Z per index of `gather`

// Copies windows of the turned, padded image, or mirror images of them, to the engine's input; one index
// per 8 voxels of a row. Reference: windows.pad_image, Box.slices and numpy.flip. B: 4 + 2 or 4.
struct GatherArgs {
    const float *image;  // (C, X, Y, Z)
    void *batches;       // each (windows, C, x, y, z), fp16 or fp32
    const int *windows;  // index of each window of the batches in the plan
    long long stride;     // from one batch to the next, in elements
    Extent shape;         // of the image
    Tiling tiling;
    AxisTransform transform;
    Extent mirror;              // 1 along the axes that are reversed in the windows
    int channels, batch, half;  // `batch` windows per batch
};
FUNCTION void put(float *to, float value) { *to = value; }
FUNCTION void put(unsigned short *to, float value) { *to = half_bits(value); }
template <class T>
FUNCTION void gather_row(const GatherArgs &a, T *to, const float *image, Row row, int z) {
    __align__(16) T values[GATHERED];
    int count = a.tiling.window.z - z;
    for (int k = 0; k < GATHERED; ++k) {
        bool there = z + k >= row.begin && z + k < row.end && k < count;
        put(values + k, there ? image[row.first + (z + k) * row.step] : 0.0f);
    }
    if (count >= GATHERED) copy_all<GATHERED>(to, values);
    else
        for (int k = 0; k < GATHERED; ++k)
            if (k < count) to[k] = values[k];
}
KERNEL(gather, GatherArgs) {
    Extent window = a.tiling.window;
    Extent groups = {window.x, window.y, (window.z + GATHERED - 1) / GATHERED};
    unsigned per_channel = (unsigned)voxels_of(groups);
    int row_number = (int)(i / per_channel), channel = row_number % a.channels;
    int slot = row_number / a.channels;
    Extent within = place(i % per_channel, groups);
    int z = within.z * GATHERED;
    within.z = 0;
    Extent source = mirrored(within, Extent{a.mirror.x, a.mirror.y, 0}, window);
    Row row = row_of(a.tiling, a.transform, a.shape, a.windows[slot], source);
    if (a.mirror.z) row = reversed(row, window.z);
    long long voxels = voxels_of(window);
    long long to = slot / a.batch * a.stride + (slot % a.batch * a.channels + channel) * voxels +
                   index(within, window) + z;
    const float *image = a.image + channel * voxels_of(a.shape);
    if (a.half) gather_row(a, (unsigned short *)a.batches + to, image, row, z);
    else gather_row(a, (float *)a.batches + to, image, row, z);
}

// Adds the logits of the mirror images of some windows, one launch for each mirror, in order; the last one
// writes the mean. With a single mirror it converts fp32 to fp16, which halves the memory. One index per
// voxel of the windows. Reference: sliding_window._infer, numpy.astype. B: K times 6, or 8 to 12 for mirrors.
struct AverageArgs {
    const void *logits;     // (windows, K, x, y, z), fp16 or fp32
    float *sums;            // of the same shape; not used with a single mirror
    void *mean;             // of the same shape, fp16 or fp32; it may be `sums`
    Extent window, mirror;  // `mirror` as in GatherArgs
    int count, half, half_mean, which, mirrors;  // `count` classes; number of the mirror, and of all
};
KERNEL(average, AverageArgs) {
    unsigned voxels = (unsigned)voxels_of(a.window), voxel = i % voxels;
    long long first = (long long)(i / voxels) * a.count * voxels;
    long long from = first + index(mirrored(place(voxel, a.window), a.mirror, a.window), a.window);
    long long to = first + voxel;
    for (int k = 0; k < a.count; ++k, from += voxels, to += voxels) {
        float value = a.half ? half_value(((const unsigned short *)a.logits)[from])
                             : ((const float *)a.logits)[from];
        if (a.which > 0) value += a.sums[to];
        if (a.which < a.mirrors - 1) {
            a.sums[to] = value;
            continue;
        }
        value /= (float)a.mirrors;
        if (a.half_mean) ((unsigned short *)a.mean)[to] = half_bits(value);
        else ((float *)a.mean)[to] = value;
    }
}

const int MOST_CLASSES = 32;
const float LEAST_WEIGHT = 1.17549435e-38f;  // the smallest normal number

template <int N> FUNCTION int first_largest(const float (&scores)[N], int count) {
    int best = 0;
    float largest = scores[0];
    for (int k = 1; k < N; ++k)
        if (k < count && scores[k] > largest) {
            best = k;
            largest = scores[k];
        }
    return best;
}

// Decision of a voxel (decide.py): the class of the largest value; or for each region in turn, where the sum
// of the values of its channels is above a threshold, its class.
enum Activation { LOGITS, SOFTMAX, SIGMOID };
struct Decision {
    float thresholds[MOST_CLASSES];
    unsigned channels[MOST_CLASSES];      // of each region; one bit per channel
    unsigned char classes[MOST_CLASSES];  // of each region
    int regions;                          // 0 for the largest value
    int activation;                       // of the values that are compared
};
template <int N> FUNCTION int decided(const Decision &d, const float (&values)[N], int count) {
    if (!d.regions) return first_largest(values, count);
    int found = 0;
    for (int r = 0; r < d.regions; ++r) {
        float sum = 0;
        for (int k = 0; k < N; ++k)
            if (d.channels[r] >> k & 1) sum += values[k];
        if (sum > d.thresholds[r]) found = d.classes[r];
    }
    return found;
}
template <int N> FUNCTION void activate(float (&logits)[N], int count, int activation) {
    if (activation == SIGMOID) {
        for (int k = 0; k < N; ++k)
            if (k < count) logits[k] = 1.0f / (1.0f + EXP(-logits[k]));
        return;
    }
    float largest = logits[0], sum = 0;
    for (int k = 1; k < N; ++k)
        if (k < count && logits[k] > largest) largest = logits[k];
    for (int k = 0; k < N; ++k)
        if (k < count) sum += logits[k] = EXP(logits[k] - largest);
    for (int k = 0; k < N; ++k)
        if (k < count) logits[k] /= sum;
}

const int BLENDED = 2;  // voxels along Z per index, for few classes

// One pass over all windows. For each voxel of the box: the mean of the logits of all windows that
// contain it, weighted by the importance map, and summed in the plan's order without atomics, hence
// deterministic. Then its class; with several passes, a vote plus 1/16 of the probability, or the
// probability alone (tta.py), is added to the scores, and the last pass writes the class. One index
// per group of voxels along Z of the turned image. Reference: sliding_window.sliding_window, tta.Fusion,
// decide.Decision. B: 2.4 K times 2 or 4, and 8K with several passes.
struct BlendArgs {
    const void *logits;       // (windows, K, x, y, z), fp16 or fp32
    const float *importance;  // (x, y, z)
    const long long *places;  // per window of the plan: element of its logits, -1 if it is all 0
    float *scores;            // (K, X, Y, Z), or null for a single pass
    unsigned char *classes;   // (X, Y, Z)
    float *blended;           // (K, X, Y, Z): receives the logits, or probabilities, in place of all else
    int *not_finite;          // set to 1 if a blended logit is not finite
    Extent shape;              // of the box
    Tiling tiling;
    AxisTransform transform;
    Decision decision;
    int count, half, half_sums;  // `count` channels of the logits; `half_sums`: sums are rounded to fp16
    int vote, which, passes;     // number of the pass, and of all
    float background[MOST_CLASSES];  // outputs of a voxel in no window, or outside the image
    float *probabilities;            // (R, X, Y, Z): receives the probability of each region, or null
    unsigned region_channels[MOST_CLASSES];  // of each region; one bit per channel
    int regions, to_probabilities;           // activation from the values that are decided on
};
FUNCTION float as_float(float value) { return value; }
FUNCTION float as_float(unsigned short bits) { return half_value(bits); }
// Reads G neighbours, those from `begin` to `end`; the others are 0. With `together`, all are read at
// once: without a branch between them, several such reads are in flight together.
template <int G, class T>
FUNCTION void read_row(float (&out)[G], const T *from, int begin, int end, bool together) {
    __align__(16) T values[G];
    if (together) copy<(int)(G * sizeof(T))>(values, from);
    else
        for (int g = 0; g < G; ++g) values[g] = g >= begin && g < end ? from[g] : (T)0;
    for (int g = 0; g < G; ++g) out[g] = as_float(values[g]);
}
// Adds the weighted logits of G voxels in one window, of which those from `begin` to `end` lie in it.
template <int N, int G, class T>
FUNCTION void add_window(const BlendArgs &a, float (&sums)[N][G], float (&weights)[G], const T *logits,
                         const float *importance, int begin, int end, bool together) {
    const int count = G > 1 ? N : a.count;
    long long voxels = voxels_of(a.tiling.window);
    float weight[G], logit[N][G];
    read_row(weight, importance, begin, end, together);
    for (int k = 0; k < N; ++k)
        if (k < count) read_row(logit[k], logits + k * voxels, begin, end, together);
    for (int g = 0; g < G; ++g) weights[g] += weight[g];
    for (int k = 0; k < N; ++k)
        for (int g = 0; g < G; ++g)
            if (k < count) sums[k][g] += logit[k][g] * weight[g];
    if (a.half_sums) {
        for (int g = 0; g < G; ++g) weights[g] = half_value(half_bits(weights[g]));
        for (int k = 0; k < N; ++k)
            for (int g = 0; g < G; ++g)
                if (k < count) sums[k][g] = half_value(half_bits(sums[k][g]));
    }
}
// The weighted mean of the logits of G voxels from `at` on along Z, for up to N classes.
template <int N, int G, class T>
FUNCTION void mean_logits(const BlendArgs &a, float (&sums)[N][G], Extent at) {
    const int count = G > 1 ? N : a.count;
    float weights[G];
    for (int g = 0; g < G; ++g) {
        weights[g] = 0;
        for (int k = 0; k < N; ++k) sums[k][g] = 0;
    }
    Extent size = a.tiling.window;
    long long voxels = voxels_of(size);
    const long long *places = a.places;
    for_windows_around(a.tiling, at, G, [&](int window, Extent within) {
        if (places[window] < 0) return;
        int begin = within.z < 0 ? -within.z : 0, end = size.z - within.z < G ? size.z - within.z : G;
        long long inner = index(within, size);
        const T *logits = (const T *)a.logits + places[window] + inner;
        const float *importance = a.importance + inner;
        // The logits of all classes are aligned alike if the window's size is a multiple of G.
        unsigned long long apart = (unsigned long long)logits % (G * sizeof(T)) +
                                   (unsigned long long)importance % (G * sizeof(float)) + voxels % G;
        if (begin == 0 && end == G && apart == 0)
            add_window(a, sums, weights, logits, importance, 0, G, true);
        else
            add_window(a, sums, weights, logits, importance, begin, end, false);
    });
    for (int g = 0; g < G; ++g) {
        float weight = weights[g] > LEAST_WEIGHT ? weights[g] : LEAST_WEIGHT;
        for (int k = 0; k < N; ++k)
            if (k < count) sums[k][g] /= weight;
        for (int k = 0; k < N; ++k)
            if (k < count && a.half_sums) sums[k][g] = half_value(half_bits(sums[k][g]));
        for (int k = 0; k < N; ++k)
            if (k < count && weights[g] == 0) sums[k][g] = a.background[k];
    }
}
// Class of a voxel by values that no later pass changes; writes the probabilities of the regions.
template <int N>
FUNCTION int final_class(const BlendArgs &a, float (&values)[N], int count, long long voxel) {
    int found = decided(a.decision, values, count);
    if (!a.probabilities) return found;
    if (a.to_probabilities != LOGITS) activate(values, count, a.to_probabilities);
    bool summed = a.scores && !a.decision.regions;  // over the passes, for the largest value
    for (int k = 0; k < N; ++k)
        if (k < count && summed) values[k] /= (float)a.passes;
    for (int r = 0; r < a.regions; ++r) {
        float sum = 0;
        for (int k = 0; k < N; ++k)
            if (a.region_channels[r] >> k & 1) sum += values[k];
        a.probabilities[r * voxels_of(a.shape) + voxel] = sum;
    }
    return found;
}
// Class of a voxel, or -1 if a later pass decides; `voxel` is its element in the image.
template <int N>
FUNCTION int class_of(const BlendArgs &a, float (&logits)[N], int count, long long voxel) {
    for (int k = 0; k < N; ++k)
        if (k < count && !(logits[k] - logits[k] == 0)) store(a.not_finite, 1);
    int best = a.vote ? first_largest(logits, count) : 0;
    if (a.decision.activation != LOGITS) activate(logits, count, a.decision.activation);
    long long box = voxels_of(a.shape);
    if (a.blended) {
        for (int k = 0; k < N; ++k)
            if (k < count) a.blended[k * box + voxel] = logits[k];
        return -1;
    }
    if (!a.scores) return final_class(a, logits, count, voxel);
    bool last = a.which == a.passes - 1;
    for (int k = 0; k < N; ++k) {
        if (k >= count) break;
        float score = logits[k];
        if (a.vote) score = score * 0.0625f + (k == best ? 1.0f : 0.0f);
        logits[k] = a.which == 0 ? score : a.scores[k * box + voxel] + score;
        if (!last) a.scores[k * box + voxel] = logits[k];
        else if (a.decision.regions) logits[k] /= (float)a.passes;
    }
    return last ? final_class(a, logits, count, voxel) : -1;
}
template <int N, int G> FUNCTION void blend_voxels(const BlendArgs &a, Extent turned) {
    float sums[N][G];
    Extent at = plus(turned, a.tiling.pad);
    if (a.half) mean_logits<N, G, unsigned short>(a, sums, at);
    else mean_logits<N, G, float>(a, sums, at);
    long long first = index(from_turned(a.transform, turned, a.shape), a.shape);
    long long step = step_along_turned_z(a.transform, a.shape);
    int left = turned_shape(a.transform, a.shape).z - turned.z;
    UNROLLED for (int g = 0; g < G; ++g) {  // a constant index keeps `sums` in registers
        if (g >= left) break;
        float logits[N];
        for (int k = 0; k < N; ++k) logits[k] = sums[k][g];
        int found = class_of(a, logits, G > 1 ? N : a.count, first + g * step);
        if (found >= 0) a.classes[first + g * step] = (unsigned char)found;
    }
}
// One kernel for each small number of classes: the sums of several voxels then fit in registers, and
// an exact number of classes takes no branches. The others take up to 8 or 32 classes, voxel by voxel.
template <int N, int G> FUNCTION void blend_index(const BlendArgs &a, unsigned i) {
    Extent of = turned_shape(a.transform, a.shape);
    Extent turned = place(i, Extent{of.x, of.y, (of.z + G - 1) / G});
    turned.z *= G;
    blend_voxels<N, G>(a, turned);
}
KERNEL(blend_2, BlendArgs) { blend_index<2, BLENDED>(a, i); }
KERNEL(blend_3, BlendArgs) { blend_index<3, BLENDED>(a, i); }
KERNEL(blend_4, BlendArgs) { blend_index<4, BLENDED>(a, i); }
KERNEL(blend_8, BlendArgs) { blend_index<8, 1>(a, i); }
KERNEL(blend_32, BlendArgs) { blend_index<MOST_CLASSES, 1>(a, i); }

// Linear interpolation of what a pass blended to the grid of the scan, in fp64 and in numpy's order, and
// its class or scores there. One index per voxel. Reference: restore.restored, tta.Fusion. B: 4K and more.
struct Taps {
    const int *first, *second;  // voxels of the image's grid for each voxel of the result, along X, Y, Z
    const double *share;        // of the second
};
struct ResampleArgs {
    const float *values;  // (K, X, Y, Z) of the image
    Taps taps;
    Extent image, start;  // shape of the image, and its place in its grid, which is background elsewhere
    int half;             // results are rounded to fp16
    BlendArgs result;     // of the result: scores, classes, shape, decision and passes
};
FUNCTION double value_at(const ResampleArgs &a, int channel, Extent at) {
    Extent own = minus(at, a.start);
    if (!inside(own, a.image)) return a.result.background[channel];
    return a.values[channel * voxels_of(a.image) + index(own, a.image)];
}
FUNCTION double between(double low, double high, double share) { return (high - low) * share + low; }
// One value of a channel between the voxels `low` and `high`, at these shares of the second.
FUNCTION float resampled(const ResampleArgs &a, int channel, Extent low, Extent high,
                         const double (&share)[3]) {
    double planes[2];
    for (int p = 0; p < 2; ++p) {
        int x = p ? high.x : low.x;
        double near = between(value_at(a, channel, Extent{x, low.y, low.z}),
                              value_at(a, channel, Extent{x, high.y, low.z}), share[1]);
        double far = between(value_at(a, channel, Extent{x, low.y, high.z}),
                             value_at(a, channel, Extent{x, high.y, high.z}), share[1]);
        planes[p] = between(near, far, share[2]);
    }
    double mixed = share[0] != 0 ? planes[0] * (1 - share[0]) + planes[1] * share[0] : planes[0];
    return a.half ? half_value(half_bits_of(mixed)) : (float)mixed;
}
template <int N> FUNCTION void resample_index(const ResampleArgs &a, unsigned i) {
    const BlendArgs &r = a.result;
    Extent at = place(i, r.shape);
    int x = at.x, y = r.shape.x + at.y, z = r.shape.x + r.shape.y + at.z;
    Extent low = {a.taps.first[x], a.taps.first[y], a.taps.first[z]};
    Extent high = {a.taps.second[x], a.taps.second[y], a.taps.second[z]};
    double share[3] = {a.taps.share[x], a.taps.share[y], a.taps.share[z]};
    float values[N];
    UNROLLED for (int k = 0; k < N; ++k)  // a constant index keeps `values` in registers
        values[k] = k < r.count ? resampled(a, k, low, high, share) : 0.0f;
    int found = class_of(r, values, r.count, i);
    if (found >= 0) r.classes[i] = (unsigned char)found;
}
KERNEL(resample_8, ResampleArgs) { resample_index<8>(a, i); }
KERNEL(resample_32, ResampleArgs) { resample_index<MOST_CLASSES>(a, i); }

// 26- or 6-connected components of one class, by union-find over voxels: the root of a tree is its
// smallest voxel index, whatever the order of the unions (Playne and Hawick, "A new algorithm for
// parallel connected-component labelling on GPUs", IEEE TPDS 29, 2018). Five kernels, in sequence.
struct LabelArgs {
    unsigned char *classes;  // (X, Y, Z), 0 is background
    int *parents;            // per voxel, -1 for background
    int *sizes;              // per voxel; the size of a component is at its root
    int *removed;            // number of removed components
    Extent shape;
    int min_voxels, faces;  // `faces`: voxels are neighbours across faces only, 6-connected
};
// Length of the run of equal values along Z that begins at `i`, 0 if `i` continues a run. Counting
// then takes one atomic addition per run instead of one per voxel.
template <class T> FUNCTION int run_along_z(const T *values, unsigned i, Extent shape) {
    int z = (int)(i % shape.z), length = 1;
    if (z > 0 && values[i - 1] == values[i]) return 0;
    while (z + length < shape.z && values[i + length] == values[i]) ++length;
    return length;
}
// Threads unite concurrently, without locks. Why the result is right: a parent is never larger than
// its child, and only `atomicMin` changes it, so each entry only decreases and paths end in a root.
// A stale entry is an earlier parent, hence an ancestor in the same tree or one that is united with
// it: following it takes longer, but leads to a member of the same component. `unite` ends when both
// roots are equal, or when its `atomicMin` has found `high` still a root. In every other case the
// entry of `high` held a smaller parent, `old`, that another thread had written: `low` and `old` both
// belong to the component, and the loop goes on with them. As every turn follows smaller indices,
// it ends.
FUNCTION int root_of(const int *parents, int i) {
    for (int parent = load(parents + i); parent != i; parent = load(parents + i)) i = parent;
    return i;
}
FUNCTION void unite(int *parents, int first, int second) {
    for (;;) {
        first = root_of(parents, first);
        second = root_of(parents, second);
        if (first == second) return;
        int low = first < second ? first : second, high = first < second ? second : first;
        int old = atomicMin(parents + high, low);
        if (old == high) return;  // it was still a root, and is now a child of `low`
        first = old;
        second = low;
    }
}
FUNCTION bool begins_run(const unsigned char *classes, unsigned i, int z) {
    return z == 0 || classes[i - 1] != classes[i];
}
// Reference: scipy.ndimage.label, cleanup.remove_small_components.
KERNEL(label_start, LabelArgs) {  // B: 9
    int z = (int)(i % a.shape.z), start = (int)i;
    int found = a.classes[i];
    for (; found && z > 0 && a.classes[start - 1] == found; --z) --start;
    a.parents[i] = found ? start : -1;  // a run along Z is one tree from the start
    a.sizes[i] = 0;
}
// Two runs are neighbours only if one has a neighbour of the other's first voxel, so that unions with
// a first voxel suffice.
KERNEL(label_merge, LabelArgs) {  // B: 5 and more
    if (!a.classes[i]) return;
    Extent at = place(i, a.shape);
    bool begins = begins_run(a.classes, i, at.z);
    for (int n = 0; n < 12; ++n) {  // the neighbours of smaller index in other rows
        if (a.faces && n != 4 && n != 10) continue;
        Extent other = {at.x + n / 9 - 1, at.y + n / 3 % 3 - 1, at.z + n % 3 - 1};
        if (!inside(other, a.shape)) continue;
        int j = (int)index(other, a.shape);
        if (a.classes[j] != a.classes[i]) continue;
        if (begins || begins_run(a.classes, (unsigned)j, other.z)) unite(a.parents, (int)i, j);
    }
}
KERNEL(label_flatten, LabelArgs) {  // B: 4 and more
    if (load(a.parents + i) >= 0) store(a.parents + i, root_of(a.parents, (int)i));
}
KERNEL(label_count, LabelArgs) {  // B: 4 and more
    int root = a.parents[i];
    if (root < 0) return;
    int length = run_along_z(a.parents, i, a.shape);
    if (length) atomicAdd(a.sizes + root, length);
}
KERNEL(label_remove, LabelArgs) {  // B: 4 and more
    int root = a.parents[i];
    if (root < 0) return;
    if (a.sizes[root] >= a.min_voxels) return;
    a.classes[i] = 0;
    if (root == (int)i) atomicAdd(a.removed, 1);
}

// The foreground with its holes filled: all voxels but the 6-connected components of voxels that are 0 in
// every channel and that reach the border of the box. `empty` marks these voxels, one launch per channel;
// then their components are labelled, `open_border` marks those at the border, and `fill` writes the mask.
// Reference of the three: foreground.filled_foreground.
struct EmptyArgs {
    const void *volume;      // int16, or fp32
    unsigned char *classes;  // (X, Y, Z) of the box: 1 where all channels so far are 0
    Layout layout;
    Extent shape, origin;    // of the box
    int floating, first;     // first channel
};
KERNEL(empty, EmptyArgs) {  // B: 4
    long long source = element(a.layout, plus(place(i, a.shape), a.origin));
    bool zero = a.floating ? ((const float *)a.volume)[source] == 0 : ((const short *)a.volume)[source] == 0;
    a.classes[i] = zero && (a.first || a.classes[i]);
}
struct FillArgs {
    const int *parents;  // as in LabelArgs; a component at the border has the size -1
    int *sizes;
    unsigned char *mask;
    int *voxels;         // number of voxels of the mask
    Extent shape;
};
KERNEL(open_border, FillArgs) {  // B: 0, as most voxels lie inside
    Extent at = place(i, a.shape);
    bool inner = at.x > 0 && at.y > 0 && at.z > 0 && at.x < a.shape.x - 1 && at.y < a.shape.y - 1 &&
                 at.z < a.shape.z - 1;
    if (!inner && a.parents[i] >= 0) store(a.sizes + a.parents[i], -1);
}
// One index per row along Z.
KERNEL(fill, FillArgs) {  // B: 5Z
    int found = 0;
    long long first = (long long)i * a.shape.z;
    for (long long j = first; j < first + a.shape.z; ++j) {
        bool filled = a.parents[j] < 0 || a.sizes[a.parents[j]] >= 0;
        a.mask[j] = filled;
        found += filled;
    }
    if (found) atomicAdd(a.voxels, found);
}

// Writes the classes of the box as label values to the volume, which is 0 elsewhere.
// Reference: numpy indexing. B: 2.
struct RestoreArgs {
    const unsigned char *classes;  // (X, Y, Z) of the box
    unsigned char *labels;
    int *counts;  // voxels per class
    Layout layout;
    Extent shape, origin;  // of the box
    unsigned char values[MOST_CLASSES];
};
KERNEL(restore, RestoreArgs) {
    Extent target = plus(place(i, a.shape), a.origin);
    int found = a.classes[i];
    a.labels[element(a.layout, target)] = a.values[found];
    int length = found ? run_along_z(a.classes, i, a.shape) : 0;
    if (length) atomicAdd(a.counts + found, length);
}
