! Text to tokens and back: byte-level BPE from the small file that tools/export_tokenizer.py writes
!
! A text is cut into words first (a space goes with the word after it; letters, digits and signs apart), then the bytes of a word are
! merged pair by pair, lowest rank first. Bytes above 127 count as letters; only signs outside ASCII are cut otherwise than by the
! original. Reference: byte-level BPE after Radford et al. 2019 (GPT-2).
module septet_tokenizer
  use, intrinsic :: iso_c_binding, only: c_int32_t, c_int64_t
  use septet_failure, only: fail
  implicit none
  private
  public :: tokenizer, read_tokenizer, encode, piece_of

  integer, parameter :: letter = 1, digit = 2, blank = 3, sign = 4

  type :: tokenizer
    !> Bytes of token t: pieces(starts(t) + 1:starts(t + 1)), t = 0, 1, ...
    character(len=:), allocatable :: pieces
    integer(c_int32_t), allocatable :: starts(:)
    integer(c_int32_t) :: of_byte(0:255)
    !> left, right, result, rank; ascending by left, then right
    integer(c_int32_t), allocatable :: merges(:, :)
    logical :: single_digits
  end type tokenizer

contains

  subroutine read_tokenizer(path, t)
    character(len=*), intent(in) :: path
    type(tokenizer), intent(out) :: t
    character(len=8) :: magic
    integer(c_int32_t) :: counts(3)
    integer(c_int32_t), allocatable :: lengths(:)
    integer(c_int64_t) :: size_bytes
    integer :: unit, status, i
    open (newunit=unit, file=path, access="stream", form="unformatted", action="read", status="old", iostat=status)
    if (status /= 0) call fail("there must be a tokenizer file "//path, "none", &
                               "write it with tools/export_tokenizer.py, or use --ids")
    inquire (unit, size=size_bytes)
    magic = ""
    read (unit, iostat=status) magic, counts, t%of_byte
    if (status /= 0 .or. magic /= "septtok1" .or. any(counts < 0) .or. any(counts > size_bytes)) call broken(path)
    allocate (lengths(counts(1)), t%merges(4, counts(2)), t%starts(0:counts(1)))
    read (unit, iostat=status) t%merges, lengths
    if (status /= 0 .or. any(lengths < 0) .or. any(lengths > 65536)) call broken(path)
    t%starts(0) = 0
    do i = 1, counts(1)
      t%starts(i) = t%starts(i - 1) + lengths(i)
      if (t%starts(i) > size_bytes) call broken(path)
    end do
    if (any(t%of_byte < -1 .or. t%of_byte >= counts(1))) call broken(path)
    if (any(t%merges(:3, :) < 0 .or. t%merges(:3, :) >= counts(1))) call broken(path)
    allocate (character(len=t%starts(counts(1))) :: t%pieces)
    read (unit, iostat=status) t%pieces
    if (status /= 0) call broken(path)
    t%single_digits = counts(3) == 1
    close (unit)
  end subroutine read_tokenizer

  subroutine broken(path)
    character(len=*), intent(in) :: path
    call fail(path//" must be a tokenizer file", "something else", "write it anew with tools/export_tokenizer.py")
  end subroutine broken

  !> The bytes of a token; none for one that does not exist
  pure function piece_of(t, token) result(piece)
    type(tokenizer), intent(in) :: t
    integer, intent(in) :: token
    character(len=:), allocatable :: piece
    piece = ""
    if (token >= 0 .and. token < ubound(t%starts, 1)) piece = t%pieces(t%starts(token) + 1:t%starts(token + 1))
  end function piece_of

  pure function encode(t, text) result(tokens)
    type(tokenizer), intent(in) :: t
    character(len=*), intent(in) :: text
    integer, allocatable :: tokens(:)
    integer :: first, last
    tokens = [integer ::]
    first = 1
    do while (first <= len(text))
      last = first + word_length(text(first:), t%single_digits) - 1
      tokens = [tokens, merge_word(t, text(first:last))]
      first = last + 1
    end do
  end function encode

  !> How many characters the first word of a text has
  pure integer function word_length(text, single_digits)
    character(len=*), intent(in) :: text
    logical, intent(in) :: single_digits
    integer :: start, kind
    word_length = 1
    if (text(1:1) == "'" .and. len(text) > 1) then
      if (index("stmd", text(2:2)) > 0) word_length = 2
      if (len(text) > 2) then
        if (text(2:3) == "re" .or. text(2:3) == "ve" .or. text(2:3) == "ll") word_length = 3
      end if
      if (word_length > 1) return
    end if
    kind = kind_of(text(1:1))
    if (kind == digit .and. single_digits) return
    start = 1
    if (kind == blank) then
      do while (word_length < len(text))
        if (kind_of(text(word_length + 1:word_length + 1)) /= blank) exit
        word_length = word_length + 1
      end do
      if (word_length == len(text)) return
      kind = kind_of(text(word_length + 1:word_length + 1))
      if (kind == digit .and. single_digits) return
      ! The last blank of a run goes with the word behind it, if it is a space
      if (word_length > 1) then
        word_length = word_length - 1
        return
      end if
      if (text(1:1) /= " ") return
      start = 2
    end if
    word_length = start
    do while (word_length < len(text))
      if (kind_of(text(word_length + 1:word_length + 1)) /= kind) exit
      word_length = word_length + 1
    end do
  end function word_length

  !> letter, digit, blank or sign
  pure integer function kind_of(character)
    character(len=1), intent(in) :: character
    integer :: code
    code = iachar(character)
    if (code >= 128 .or. code < 0 .or. index("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", character) > 0) then
      kind_of = letter
    else if (index("0123456789", character) > 0) then
      kind_of = digit
    else if (code == 32 .or. code >= 9 .and. code <= 13) then
      kind_of = blank
    else
      kind_of = sign
    end if
  end function kind_of

  pure function merge_word(t, word) result(tokens)
    type(tokenizer), intent(in) :: t
    character(len=*), intent(in) :: word
    integer, allocatable :: tokens(:)
    integer :: i, best, found, best_merge
    tokens = [(int(t%of_byte(iand(iachar(word(i:i)), 255))), i=1, len(word))]
    ! A byte that no token stands for is left out, as the original does
    tokens = pack(tokens, tokens >= 0)
    do
      best = 0
      best_merge = 0
      do i = 1, size(tokens) - 1
        found = merge_of(t, tokens(i), tokens(i + 1))
        if (found == 0) cycle
        if (best_merge > 0) then
          if (t%merges(4, found) >= t%merges(4, best_merge)) cycle
        end if
        best = i
        best_merge = found
      end do
      if (best == 0) return
      tokens = [tokens(:best - 1), int(t%merges(3, best_merge)), tokens(best + 2:)]
    end do
  end function merge_word

  !> Where the merge of two tokens stands, 0 when there is none
  pure integer function merge_of(t, left, right)
    type(tokenizer), intent(in) :: t
    integer, intent(in) :: left, right
    integer :: low, high
    low = 1
    high = size(t%merges, 2)
    do while (low <= high)
      merge_of = (low + high) / 2
      if (t%merges(1, merge_of) == left .and. t%merges(2, merge_of) == right) return
      if (t%merges(1, merge_of) < left .or. t%merges(1, merge_of) == left .and. t%merges(2, merge_of) < right) then
        low = merge_of + 1
      else
        high = merge_of - 1
      end if
    end do
    merge_of = 0
  end function merge_of
end module septet_tokenizer
