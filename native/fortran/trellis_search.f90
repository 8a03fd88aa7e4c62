! The encoder of the trellis code: the exact Viterbi search that septet.codes.trellis_search defines, with the same ties
!
! Pass one runs over pairs 96..127, 0..31 and finds the state at the tile's boundary; pass two starts and ends in that state.
! The state after a pair is the upper 16 - bits bits of its window, which are the lower bits of the next one.
module septet_trellis_encoder
  use, intrinsic :: iso_c_binding, only: c_int8_t, c_int16_t, c_int32_t
  use septet_codes, only: tile_pairs
  implicit none
  private
  public :: encode_tile

  integer, parameter :: windows = 65536, around = 32
  integer(c_int32_t), parameter :: forbidden = 2**22

contains

  !> fixed: quarter levels in stream order; levels: both levels of every window; symbols: 0 .. 2**bits - 1
  pure subroutine encode_tile(fixed, levels, bits, symbols)
    integer(c_int16_t), intent(in) :: fixed(2, 0:tile_pairs - 1)
    integer(c_int8_t), intent(in) :: levels(2, 0:windows - 1)
    integer, intent(in) :: bits
    integer, intent(out) :: symbols(0:tile_pairs - 1)
    integer(c_int32_t), allocatable :: cost(:)
    integer(c_int16_t), allocatable :: best(:, :)
    integer :: states, boundary, ignored(around)
    states = windows / 2**bits
    allocate (cost(0:states - 1), best(0:states - 1, 0:tile_pairs - 1))
    cost = 0
    call forward(reshape([fixed(:, tile_pairs - around:), fixed(:, :around - 1)], [2, 2 * around]), levels, bits, cost, &
                 best(:, :2 * around - 1))
    boundary = minloc(cost, 1) - 1
    call trace_back(best(:, around:2 * around - 1), bits, boundary, ignored)
    cost = forbidden
    cost(boundary) = 0
    call forward(fixed, levels, bits, cost, best)
    call trace_back(best, bits, boundary, symbols)
  end subroutine encode_tile

  !> best(s, p): the lowest symbol of pair p with which a cheapest path reaches state s
  pure subroutine forward(fixed, levels, bits, cost, best)
    integer(c_int16_t), intent(in) :: fixed(:, 0:)
    integer(c_int8_t), intent(in) :: levels(2, 0:windows - 1)
    integer, intent(in) :: bits
    integer(c_int32_t), intent(inout) :: cost(0:)
    integer(c_int16_t), intent(out) :: best(0:, 0:)
    integer(c_int32_t) :: candidates(0:2**bits - 1, 0:size(cost) - 1)
    integer :: p
    integer :: s
    do p = 0, size(fixed, 2) - 1
      call add_metric(int(fixed(:, p), c_int32_t), levels, cost, candidates)
      do concurrent (s = 0:size(cost) - 1)
        best(s, p) = int(minloc(candidates(:, s), 1) - 1, c_int16_t)
      end do
      do concurrent (s = 0:size(cost) - 1)
        cost(s) = candidates(best(s, p), s)
      end do
      cost = cost - minval(cost)
    end do
  end subroutine forward

  !> Cost of every window: that of the state before it, and 2 |T|^2 - x . T
  pure subroutine add_metric(x, levels, cost, candidates)
    integer(c_int32_t), intent(in) :: x(2)
    integer(c_int8_t), intent(in) :: levels(2, 0:windows - 1)
    integer(c_int32_t), intent(in) :: cost(0:)
    integer(c_int32_t), intent(out) :: candidates(0:windows - 1)
    integer(c_int32_t) :: a, b
    integer :: high, s, w
    do high = 0, windows - 1, size(cost)
      do s = 0, size(cost) - 1
        w = high + s
        a = int(levels(1, w), c_int32_t)
        b = int(levels(2, w), c_int32_t)
        candidates(w) = cost(s) + a * (2 * a - x(1)) + b * (2 * b - x(2))
      end do
    end do
  end subroutine add_metric

  !> Follow the decisions back from the last state; `state` ends as the one before the first pair
  pure subroutine trace_back(best, bits, state, symbols)
    integer(c_int16_t), intent(in) :: best(0:, 0:)
    integer, intent(in) :: bits
    integer, intent(inout) :: state
    integer, intent(out) :: symbols(0:)
    integer :: p
    do p = size(symbols) - 1, 0, -1
      symbols(p) = best(state, p)
      state = iand(ior(ishft(state, bits), symbols(p)), size(best, 1) - 1)
    end do
  end subroutine trace_back
end module septet_trellis_encoder
