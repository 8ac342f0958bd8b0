// Counts |x| of a tensor in a histogram whose limit doubles when larger values come; see qat/calibration/histogram.py,
// which defines the constants in capitals.

// Calls ``see`` for each of this thread's elements. Aligned elements are loaded by fours, one load ahead.
template <typename See> __device__ void each(const float* __restrict__ x, unsigned int size, See see) {
    unsigned int first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
    unsigned int fours = (unsigned long long)x % sizeof(float4) ? 0 : size / 4;
    const float4* x4 = reinterpret_cast<const float4*>(x);
    float4 next = first < fours ? x4[first] : float4();
    for (unsigned int i = first; i < fours; i += stride) {
        float4 some = next;
        if (i + stride < fours) next = x4[i + stride];
        see(some.x), see(some.y), see(some.z), see(some.w);
    }
    for (unsigned int i = 4 * fours + first; i < size; i += stride) see(x[i]);
}

// The counts of one block. Each thread counts zeros, most of the values after a ReLU, in its own register.
struct Found {
    unsigned int* bins;
    float bins_per_unit;
    unsigned int zeros = 0;

    __device__ Found(unsigned int* shared, float limit) : bins(shared), bins_per_unit(limit > 0 ? BINS / limit : 0) {
        for (int j = threadIdx.x; j < BINS; j += blockDim.x) bins[j] = 0;
        __syncthreads();
    }
    __device__ void add(float magnitude) {
        if (magnitude == 0) ++zeros;
        else atomicAdd(&bins[min((int)(magnitude * bins_per_unit), BINS - 1)], 1u);
    }
    __device__ void add_to(unsigned long long* counts) {
        atomicAdd(&bins[0], zeros);
        __syncthreads();
        for (int j = threadIdx.x; j < BINS; j += blockDim.x)
            if (bins[j]) atomicAdd(&counts[j], (unsigned long long)bins[j]);
    }
};

// The state of an observer; the members after ``largest`` pass between the two kernels. Nonnegative floats compare like
// their bits as integers, and NaN compares above all numbers.
struct State {
    unsigned long long counts[BINS];
    float limit, largest;
    unsigned int blocks_done, largest_here;
    float rest;  // values of the tensor with magnitudes above this are not counted yet; negative: all are counted
};
static_assert(sizeof(State) == STATE_BYTES, "State must have the size of the tensor that holds it");

// Run by one block. Doubles the limit until it reaches the largest value; each doubling merges pairs of bins.
__device__ void grow(State* state) {
    __shared__ unsigned long long merged[BINS];
    float reach = state->limit, largest = state->largest;
    int doublings = 0;
    if (largest <= LARGEST) {  // not when it is NaN
        if (reach == 0 && largest > 0) reach = fmaxf(largest, SMALLEST_LIMIT);
        for (; reach < largest; ++doublings) reach *= 2;
    }
    for (int j = threadIdx.x; j < BINS; j += blockDim.x) merged[j] = 0;
    __syncthreads();
    if (threadIdx.x == 0) state->limit = reach;
    if (doublings == 0) return;
    if (doublings > 11) doublings = 11;  // all in one bin
    for (int j = threadIdx.x; j < BINS; j += blockDim.x) atomicAdd(&merged[j >> doublings], state->counts[j]);
    __syncthreads();
    for (int j = threadIdx.x; j < BINS; j += blockDim.x) state->counts[j] = merged[j];
}

// Counts the values within the limit, finds the largest, and makes the limit grow to it.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
count(const float* x, int size, State* state) {
    __shared__ unsigned int bins[BINS];
    __shared__ bool is_last;
    float reach = state->limit;
    unsigned int most = 0;
    Found found(bins, reach);
    each(x, size, [&](float value) {
        float magnitude = fabsf(value);
        most = max(most, __float_as_uint(magnitude));
        if (magnitude <= reach) found.add(magnitude);
    });
    found.add_to(state->counts);
    for (int lanes = 16; lanes; lanes /= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, lanes));
    if ((threadIdx.x & 31) == 0) atomicMax(&state->largest_here, most);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicInc(&state->blocks_done, gridDim.x - 1) == gridDim.x - 1;  // then it is 0
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.x == 0) {
        unsigned int here = atomicExch(&state->largest_here, 0u);
        state->rest = __uint_as_float(here) <= reach ? -1 : reach;
        state->largest = __uint_as_float(max(here, __float_as_uint(state->largest)));
    }
    __threadfence();
    __syncthreads();
    grow(state);
}

// Counts the values that were above the limit before it grew; mostly there are none.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
count_rest(const float* x, int size, State* state) {
    __shared__ unsigned int bins[BINS];
    float rest = state->rest;
    if (rest < 0) return;
    Found found(bins, state->limit);
    each(x, size, [&](float value) {
        float magnitude = fabsf(value);
        if (magnitude > rest) found.add(magnitude);
    });
    found.add_to(state->counts);
}
