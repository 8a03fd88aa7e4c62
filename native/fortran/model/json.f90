! A small JSON reader: finds members and elements in a text by their positions, copies nothing, never reads outside the text
!
! A span is the first and last character of a value; first = 0 means that there is no such value. Text that is not JSON gives
! missing values, not crashes. Names are compared as they are written, without undoing escapes: septet's need none.
module septet_json
  use, intrinsic :: iso_c_binding, only: c_double, c_int64_t
  implicit none
  private
  public :: span, whole, exists, member, element, text_of, integer_of, real_of, is_true

  type :: span
    integer :: first = 0, last = -1
  end type span

contains

  pure type(span) function whole(text)
    character(len=*), intent(in) :: text
    whole = span(skip_blanks(text, 1), len_trim(text))
  end function whole

  elemental logical function exists(value)
    type(span), intent(in) :: value
    exists = value%first > 0
  end function exists

  !> The value that an object has under a name
  pure type(span) function member(text, object, name)
    character(len=*), intent(in) :: text, name
    type(span), intent(in) :: object
    integer :: at, stop
    logical :: found
    if (.not. exists(object)) return
    if (text(object%first:object%first) /= '{') return
    at = skip_blanks(text, object%first + 1)
    do while (at < object%last)
      stop = end_of_value(text, at)
      if (text(at:at) /= '"' .or. stop > object%last) return
      found = text(at + 1:stop - 1) == name .and. stop - at - 1 == len(name)
      at = skip_blanks(text, stop + 1)
      if (at >= object%last) return
      if (text(at:at) /= ':') return
      at = skip_blanks(text, at + 1)
      stop = end_of_value(text, at)
      if (stop > object%last) return
      if (found) then
        member = span(at, stop)
        return
      end if
      at = skip_blanks(text, stop + 1)
      if (text(at:at) == ',') at = skip_blanks(text, at + 1)
    end do
  end function member

  !> Element 1, 2, ... of an array
  pure type(span) function element(text, array, index)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: array
    integer, intent(in) :: index
    integer :: at, stop, i
    if (.not. exists(array)) return
    if (text(array%first:array%first) /= '[') return
    at = skip_blanks(text, array%first + 1)
    do i = 1, index
      if (at >= array%last) return
      stop = end_of_value(text, at)
      if (stop >= array%last) return
      if (i == index) element = span(at, stop)
      at = skip_blanks(text, stop + 1)
      if (text(at:at) == ',') at = skip_blanks(text, at + 1)
    end do
  end function element

  !> The characters of a string, "" for anything else
  pure function text_of(text, value) result(string)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: value
    character(len=:), allocatable :: string
    string = ""
    if (.not. exists(value) .or. value%last <= value%first) return
    if (text(value%first:value%first) == '"') string = text(value%first + 1:value%last - 1)
  end function text_of

  !> A number, or `otherwise` for anything else
  pure integer(c_int64_t) function integer_of(text, value, otherwise)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: value
    integer(c_int64_t), intent(in) :: otherwise
    integer :: status
    integer_of = otherwise
    if (.not. is_number(text, value)) return
    read (text(value%first:value%last), '(i30)', iostat=status) integer_of
    if (status /= 0) integer_of = otherwise
  end function integer_of

  pure real(c_double) function real_of(text, value, otherwise)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: value
    real(c_double), intent(in) :: otherwise
    integer :: status
    real_of = otherwise
    if (.not. is_number(text, value)) return
    read (text(value%first:value%last), '(f30.0)', iostat=status) real_of
    if (status /= 0) real_of = otherwise
  end function real_of

  pure logical function is_number(text, value)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: value
    is_number = .false.
    if (.not. exists(value) .or. value%last - value%first >= 30) return
    is_number = verify(text(value%first:value%last), "+-.0123456789eE") == 0
  end function is_number

  pure logical function is_true(text, value)
    character(len=*), intent(in) :: text
    type(span), intent(in) :: value
    is_true = .false.
    if (exists(value)) is_true = text(value%first:value%last) == "true"
  end function is_true

  !> The next position that holds no blank; the last one of the text if there is none
  pure integer function skip_blanks(text, from)
    character(len=*), intent(in) :: text
    integer, intent(in) :: from
    skip_blanks = min(from, len(text))
    do while (skip_blanks < len(text))
      if (index(" "//char(9)//char(10)//char(13), text(skip_blanks:skip_blanks)) == 0) return
      skip_blanks = skip_blanks + 1
    end do
  end function skip_blanks

  !> The last character of the value that begins at `from`; beyond the text when it has no end
  pure integer function end_of_value(text, from)
    character(len=*), intent(in) :: text
    integer, intent(in) :: from
    integer :: depth
    logical :: in_string
    depth = 0
    in_string = .false.
    end_of_value = from
    do while (end_of_value <= len(text))
      if (in_string) then
        if (text(end_of_value:end_of_value) == '\') then
          end_of_value = end_of_value + 1
        else if (text(end_of_value:end_of_value) == '"') then
          in_string = .false.
          if (depth == 0) return
        end if
      else
        select case (text(end_of_value:end_of_value))
        case ('"')
          in_string = .true.
        case ('{', '[')
          depth = depth + 1
        case ('}', ']')
          depth = depth - 1
          if (depth == 0) return
        case (',', ' ', ':', char(9), char(10), char(13))
          if (depth == 0) exit
        end select
        if (depth < 0) exit
      end if
      end_of_value = end_of_value + 1
    end do
    if (end_of_value <= len(text)) end_of_value = end_of_value - 1
    if (depth > 0 .or. in_string) end_of_value = len(text) + 1
  end function end_of_value
end module septet_json
