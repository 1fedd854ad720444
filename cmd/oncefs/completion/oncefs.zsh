#compdef oncefs
# zsh completion for oncefs. The program itself says what can come next, so this
# stays true when it changes.
_oncefs() {
	local program=${(Q)words[1]} kind line
	local -a lines candidates
	[[ $program == */* && -x $program ]] || program=oncefs
	lines=("${(@f)$("$program" internal-complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}")
	kind=$lines[1]
	shift lines
	[[ $PREFIX == --*=* ]] && compset -P '--*='
	case $kind in
	words)
		for line in $lines; do
			candidates+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
		done
		_describe -t words 'what comes next' candidates
		;;
	files) _files ;;
	directories) _files -/ ;;
	users) _users ;;
	groups) _groups ;;
	*) _message 'nothing to choose from' ;;
	esac
}
if [[ $funcstack[1] == _oncefs ]]; then
	_oncefs "$@"
else
	compdef _oncefs oncefs
fi
